"""The unit of ``systemd/`` under a real systemd: started, stopped, killed, reloaded, shut down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from elastic_ckpt.cli.status.view import StatusView
from tests.job import TINY, Job
from tests.machine import REPOSITORY, Machine, why_not

UNITS = REPOSITORY / "systemd"
UNIT = UNITS / "elastic-ckpt@.service"
EXPOSURE = 25  # what systemd-analyze security gives the unit, times ten

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


class Service:
    """A job file, its instance of the unit, and what the job's directory shows from outside."""

    def __init__(self, machine: Machine, root: Path, name: str, *arguments: str, **keys: object):
        self.machine = machine
        self.name = f"elastic-ckpt@{name}"
        self.file = f"/etc/elastic-ckpt/{name}.toml"
        self.keys = {
            "dir": str(root / name),
            "script": str(TINY),
            "args": list(arguments) or ["--epochs", "1000", "--pause", "0.01"],
            "nproc": 2,
            "notice-source": ["none"],
        } | keys
        self.job = Job(root / f"{name}-outside")
        self.job.directory = root / name
        self.write()

    def write(self, **keys: object) -> None:
        self.keys |= keys
        lines = [f"{key} = {_toml(value)}" for key, value in self.keys.items()]
        self.machine.write(self.file, "\n".join(lines) + "\n")

    def start(self) -> None:
        self.machine.systemctl("start", self.name)

    def stop(self) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        self.machine.systemctl("stop", self.name)
        return time.monotonic() - began

    def show(self) -> dict[str, str]:
        return self.machine.show(self.name)

    def view(self) -> StatusView:
        """As a user logged in there sees it: the board is in the machine's memory."""
        command = ours("status", "--json", str(self.keys["dir"]))
        shown = self.machine.run(*command, check=False)
        return msgspec.json.decode(shown, type=StatusView)

    def until(self, condition, what: str, seconds: float = 180.0) -> StatusView:
        limit = time.monotonic() + seconds
        while not condition(view := self.view()):
            if time.monotonic() > limit:
                message = self.machine.journal(self.name)[-6000:]
                raise AssertionError(f"not within {seconds} s: {what}; {view}\n{message}")
            time.sleep(0.2)
        return view

    def until_step(self, step: int) -> StatusView:
        return self.until(
            lambda view: (
                view.state == "running" and bool(view.position and view.position.step >= step)
            ),
            f"step {step}",
        )

    def pid(self) -> int:
        """The supervisor's, as this host has it."""
        return self.machine.host_pid(int(self.show()["MainPID"]))


def _toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def machine(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine(tmp_path_factory.mktemp("machine"), [root]) as found:
        install(found, root)
        yield found


def install(machine: Machine, root: Path) -> None:
    """Install as systemd/README.md describes, by the commands that installing prints."""
    shown = machine.run(*ours("systemd", "install"))
    for line in shown.partition("next:\n")[2].splitlines()[:3]:
        machine.run(*line.split())
    machine.run("chown", "elastic-ckpt", str(root))
    machine.write(
        "/etc/systemd/system/elastic-ckpt@.service.d/test.conf",
        f"[Service]\nEnvironment=PYTHONPATH={REPOSITORY}\n"
        f"BindPaths={root}\nBindReadOnlyPaths={REPOSITORY} {sys.prefix}\n"
        "TimeoutStopSec=3s\nWatchdogSec=4s\nStartLimitBurst=1000\n",
    )
    machine.systemctl("daemon-reload")


def ours(*words: str) -> list[str]:
    """The command line of a user of the machine."""
    return ["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-m", "elastic_ckpt", *words]


def test_unit_is_ready_at_the_first_step_and_a_stop_saves(machine: Machine, root: Path) -> None:
    service = Service(machine, root, "stop")
    machine.keep(f"{service.name}.service")
    service.start()
    view = service.view()
    assert (view.state, len(view.workers)) == ("running", 2)
    assert service.show()["StatusText"].startswith("training, incarnation 1")
    service.until_step(20)
    seconds = service.stop()
    shown = service.show()
    assert (shown["ActiveState"], shown["Result"]) == ("inactive", "success"), service.job.output()
    assert shown["ExecMainStatus"] == "75"
    view = service.view()
    assert (view.state, view.newest_intact.reason) == ("preempted", "emergency")
    print(f"\nsystemctl stop: sealed at step {view.newest_intact.step}, {seconds:.2f} s in all")


def test_stop_waits_for_a_slow_save(machine: Machine, root: Path) -> None:
    """All ranks evaluate for longer than TimeoutStopSec, which is extended meanwhile."""
    arguments = ["--epochs", "1000", "--pause", "0.01", "--slow-eval", "7"]
    service = Service(machine, root, "slow", *arguments, grace=60)
    service.start()
    service.until(lambda view: any(w.phase == "evaluating" for w in view.workers), "evaluation")
    seconds = service.stop()
    assert service.show()["Result"] == "success"
    assert service.view().newest_intact.reason == "emergency"
    assert seconds > 3, "the stop was no longer than TimeoutStopSec: this test shows nothing"


def test_watchdog_restarts_a_hung_supervisor(machine: Machine, root: Path) -> None:
    service = Service(machine, root, "hung", **{"save-interval": 10})
    service.start()
    step = service.until_step(30).newest_intact.step
    began = time.monotonic()
    subprocess.run(["kill", "-STOP", str(service.pid())], check=True)
    machine.until(service.name, lambda shown: shown["NRestarts"] == "1", "the restart")
    view = service.until_step(step + 20)
    print(f"\nwatchdog: training again {time.monotonic() - began:.1f} s after the hang (4 s of it)")
    assert view.incarnation == 2
    service.stop()


def test_killed_supervisor_resumes_from_memory(machine: Machine, root: Path) -> None:
    service = Service(machine, root, "killed", **{"save-interval": 10})
    service.start()
    step = service.until_step(40).newest_intact.step
    began = time.monotonic()
    machine.systemctl("kill", "--signal=KILL", service.name)
    machine.until(service.name, lambda shown: shown["NRestarts"] == "1", "the restart")
    view = service.until(lambda view: view.incarnation == 2 and view.state == "running", "training")
    print(f"\nsystemctl kill -s KILL: training again after {time.monotonic() - began:.1f} s")
    assert view.position.step >= step
    service.stop()


def test_unit_reload_changes_the_save_interval(machine: Machine, root: Path) -> None:
    service = Service(machine, root, "reload", **{"save-interval": "100000s"})
    service.start()
    service.until_step(20)
    assert service.job.checkpoints() == []
    service.write(**{"save-interval": "1s"})
    machine.systemctl("reload", service.name)
    service.until(lambda view: len(service.job.checkpoints()) >= 2, "saves")
    assert service.show()["ActiveState"] == "active"
    assert service.show()["NRestarts"] == "0"
    service.stop()


def test_notice_is_served_and_the_next_start_waits(machine: Machine, root: Path) -> None:
    notice = "/run/elastic-ckpt/notice"
    service = Service(machine, root, "notice", **{"notice-file": notice})
    service.start()
    service.until_step(10)
    machine.write(notice, "40 the machine goes\n")
    machine.until(service.name, lambda shown: shown["NRestarts"] == "1", "a new start")
    shown = machine.until(
        service.name, lambda shown: "waiting" in shown.get("StatusText", ""), "it waits", 20
    )
    assert shown["ActiveState"] == "activating"
    service.stop()
    view = service.view()
    assert (view.incarnation, view.newest_intact.reason) == (1, "emergency")
    machine.run("rm", notice)


@pytest.mark.parametrize(("key", "code"), [({"dri": "x"}, "64"), ({"dir": "/proc/1"}, "73")])
def test_permanent_failure_is_not_restarted(
    machine: Machine, root: Path, key: dict[str, str], code: str
) -> None:
    service = Service(machine, root, f"wrong{code}", **key)
    machine.systemctl("start", service.name, check=False)
    shown = machine.until(service.name, lambda s: s["ActiveState"] == "failed", "failed")
    assert (shown["ExecMainStatus"], shown["NRestarts"]) == (code, "0"), machine.journal(
        service.name
    )


def test_doctor_reports_unit_problems(machine: Machine, root: Path) -> None:
    def doctor() -> list[dict]:
        command = ours("doctor", "--unit", "checked", "--json")
        return json.loads(machine.run(*command, check=False))

    def problems() -> list[str]:
        return [one["text"] for one in doctor() if one["state"] == "problem"]

    service = Service(machine, root, "checked")
    assert problems() == []
    dropin = f"/etc/systemd/system/{service.name}.service.d/wrong.conf"
    machine.write(dropin, "[Service]\nKillMode=control-group\nOOMPolicy=stop\n")
    machine.systemctl("daemon-reload")
    assert problems() == ["KillMode is control-group", "OOMPolicy is stop"]
    machine.run("rm", dropin)
    machine.systemctl("daemon-reload")
    service.write(dir="/etc/nowhere")
    assert problems() == ["elastic-ckpt cannot write it"]
    service.write(nproc="many")
    assert problems() == ["invalid --nproc 'many': give a positive number or auto"]
    service.write(**{"nprok": 2})
    assert len(problems()) == 1 and "did you mean nproc" in problems()[0]


def test_finished_job_is_not_restarted(machine: Machine, root: Path) -> None:
    service = Service(machine, root, "done", "--epochs", "1")
    machine.keep(f"{service.name}.service")
    for _ in range(2):  # the second time there is nothing left to do
        service.start()
        shown = machine.until(service.name, lambda s: s["ActiveState"] == "inactive", "the end")
        assert (shown["Result"], shown["ExecMainStatus"]) == ("success", "0")
    assert service.view().state == "finished"


def test_environment_files_reach_the_script_and_the_jobs_own_wins(
    machine: Machine, root: Path
) -> None:
    service = Service(machine, root, "variables")
    machine.write("/etc/elastic-ckpt/environment", "OF_ALL=1\nBOTH=all\n")
    machine.write("/etc/elastic-ckpt/variables.env", 'BOTH="the job"\n')
    machine.run("chmod", "600", "/etc/elastic-ckpt/variables.env")
    service.start()
    [worker, *_] = service.until_step(5).workers
    found = machine.run("cat", f"/proc/{worker.pid}/environ").split("\0")
    assert {"OF_ALL=1", "BOTH=the job"} <= set(found)
    service.stop()


def test_lines_have_priorities_in_the_journal(machine: Machine, root: Path) -> None:
    service = Service(machine, root, "priorities", **{"max-failures": 1})
    service.start()
    service.until_step(5)
    [worker, *_] = service.view().workers
    machine.run("kill", "-KILL", str(worker.pid))
    service.until(lambda view: view.incarnation == 2 and view.state == "running", "a restart")
    service.stop()
    service.write(nproc="many")
    machine.systemctl("start", service.name, check=False)
    shown = machine.run("journalctl", "-o", "json", "-u", service.name)
    lines = [json.loads(line) for line in shown.splitlines()]
    priorities = {
        line["MESSAGE"]: int(line["PRIORITY"])
        for line in lines
        if line.get("_COMM") != "systemd" and line["MESSAGE"].startswith("elastic-ckpt: ")
    }

    def of(text: str) -> set[int]:
        return {value for line, value in priorities.items() if text in line}

    assert of("training, incarnation") == {6}
    assert of("killed by SIGKILL") == {4}
    assert of("saving") == {5} and of("invalid nproc") == {3}


def test_service_of_a_user(machine: Machine) -> None:
    """Without root: its unit, its job file and its service manager."""
    home = Path("/home/someone")
    machine.run("useradd", "--create-home", "someone")
    number = machine.run("id", "-u", "someone").strip()
    machine.systemctl("start", f"user@{number}")

    def theirs(*words: str, check: bool = True) -> str:
        variables = [f"XDG_RUNTIME_DIR=/run/user/{number}", f"HOME={home}", "USER=someone"]
        someone = ["setpriv", f"--reuid={number}", "--clear-groups", f"--regid={number}"]
        return machine.run(*someone, "env", *variables, *words, check=check)

    theirs(*ours("systemd", "install", "--user"))
    jobs = home / ".config/elastic-ckpt"
    theirs("mkdir", "-p", str(jobs))
    job = f'dir = "{home}/ck"\nscript = "{TINY}"\nnproc = 1\nnotice-source = ["none"]\n'
    job += 'args = ["--epochs", "1000", "--pause", "0.01"]\n'
    machine.write(str(jobs / "mine.toml"), job)
    machine.write(str(jobs / "environment"), f"PYTHONPATH={REPOSITORY}\n")
    theirs("systemctl", "--user", "daemon-reload")
    theirs("systemctl", "--user", "start", "elastic-ckpt@mine")
    found = json.loads(theirs(*ours("doctor", "--unit", "mine", "--json"), check=False))
    texts = [one["text"] for one in found]
    assert {"configured correctly", "valid job file"} <= set(texts), texts
    theirs("systemctl", "--user", "stop", "elastic-ckpt@mine")
    shown = theirs("systemctl", "--user", "show", "elastic-ckpt@mine", "-p", "Result")
    assert shown.strip() == "Result=success"
    assert "emergency" in machine.run(*ours("list", f"{home}/ck", "--json"))


def test_uninstall_refuses_while_a_job_runs(machine: Machine, root: Path) -> None:
    service = Service(machine, root, "removed")
    service.start()
    refused = machine.run("sh", "-c", " ".join(ours("systemd", "uninstall")) + " 2>&1", check=False)
    assert f"systemctl stop {service.name}.service" in refused
    service.stop()


def test_shutdown_waits_for_the_save(root: Path, tmp_path: Path) -> None:
    with Machine(tmp_path / "machine", [root]) as machine:
        install(machine, root)
        service = Service(machine, root, "shutdown")
        service.start()
        service.until_step(20)
        began = time.monotonic()
        machine.systemctl("poweroff")
        assert machine.wait() == -signal.SIGINT
        seconds = time.monotonic() - began
        view = service.job.view()
        assert (view.state, view.newest_intact.reason) == ("preempted", "emergency")
        print(f"\npoweroff: sealed at step {view.newest_intact.step}, down after {seconds:.1f} s")


# -- the files themselves -----------------------------------------------------------------------


def test_systemd_analyze_accepts_the_unit(tmp_path: Path) -> None:
    """A key that it does not know is a warning only."""
    unit = tmp_path / UNIT.name
    shutil.copy(UNIT, unit)
    verify = ["systemd-analyze", "verify", str(unit)]
    found = subprocess.run(verify, capture_output=True, text=True, timeout=30)
    assert (found.returncode, found.stderr) == (0, "")
    unit.write_text(unit.read_text().replace("KillMode", "KillMod"))
    found = subprocess.run(verify, capture_output=True, text=True, timeout=30)
    assert "KillMod" in found.stderr


def test_unit_exposure_is_within_its_limit() -> None:
    def analyze(threshold: int) -> int:
        command = ["systemd-analyze", "security", "--offline=true", f"--threshold={threshold}"]
        return subprocess.run([*command, str(UNIT)], capture_output=True, timeout=30).returncode

    assert (analyze(EXPOSURE), analyze(EXPOSURE - 1)) == (0, 1)
    assert f"{EXPOSURE / 10}" in (UNITS / "README.md").read_text()


def test_systemd_analyze_accepts_the_users_unit(tmp_path: Path) -> None:
    """It looks for the user's directories, and starts nothing."""
    verify = ["systemd-analyze", "verify", "--user", str(UNITS / "user" / UNIT.name)]
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    found = subprocess.run(verify, capture_output=True, text=True, timeout=30, env=environment)
    assert (found.returncode, found.stderr) == (0, "")

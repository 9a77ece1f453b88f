"""Scripts that save by themselves, unmodified, under ``elastic-ckpt run``: notices, crashes in the
middle of a save, a killed supervisor. The final weights equal an undisturbed run's."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from elastic_ckpt.checkpoint.own.seal import OwnSeal, seals
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.job import SCRIPTS, Job, environment, survivors
from tests.marks import slow

pytestmark = pytest.mark.one_torch


class OwnJob(Job):
    """A job whose script writes below the directory that it is started in."""

    def __init__(self, root: Path, script: str, *arguments: str, nproc: int = 1) -> None:
        super().__init__(root, *arguments, nproc=nproc, script=SCRIPTS / script)
        self.prefix = ["env", "-C", str(root)]
        self.given: tuple[str, ...] = ()

    def start(self, *options: str) -> OwnJob:
        """Start; without options as the last time."""
        self.given = options or self.given
        super().start(*self.given)
        return self

    def seals(self) -> list[OwnSeal]:
        return seals(JobDirectory.at(self.directory))

    def until_sealed(self, count: int = 1) -> OwnSeal:
        """Wait until this many seals have been made, in all runs; the newest."""
        self.until(lambda _: self.seals() and self.seals()[0].number >= count, f"{count} seals")
        return self.seals()[0]

    def until_running(self, incarnation: int = 1) -> None:
        self.until(
            lambda view: view.incarnation >= incarnation and all(w.pid for w in view.workers)
            and len(view.workers) == self.nproc, "its workers",
        )  # fmt: skip

    def command(self, name: str, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", name, str(self.directory), *options],
            capture_output=True, text=True, timeout=60, env=environment(), check=False,
        )  # fmt: skip

    def aside(self) -> list[str]:
        return [str(event["data"]["reason"]) for event in self.of_kind("quarantined")]

    def of_kind(self, kind: str) -> list[dict]:
        return [event for event in self.events() if event["event"] == kind]


def undisturbed(
    root: Path, script: str, *arguments: str, ranks: int = 1, packages: tuple[Path, ...] = ()
) -> Path:
    """Run a script as its users do, without elastic-ckpt; return the directory that it ran in."""
    root.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / script), *arguments],
            cwd=root, env=environment(*packages) | place | {"RANK": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        assert [one.wait(200) for one in running] == [0] * ranks
    finally:
        for one in running:
            one.kill()
            one.wait(30)
    return root


def assert_equal(one: Path, other: Path) -> None:
    a, b = torch.load(one, weights_only=True), torch.load(other, weights_only=True)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


RESUME = ("--resume-args", "--init_from=resume")
OVERWRITTEN = ("--watch", "out/ckpt.pt", *RESUME)


@pytest.mark.slow
def test_one_file_that_is_overwritten(tmp_path: Path) -> None:
    """A save is torn by SIGKILL; the copy comes back. A notice then finds no handler."""
    expected = undisturbed(tmp_path / "plain", "own_nanogpt.py")
    with OwnJob(tmp_path / "a b", "own_nanogpt.py", "--pause=0.3", "--tear_at=20") as job:
        job.start(*OVERWRITTEN)
        job.until(lambda _: "resumed at 10" in job.output(), "a restart")
        (why,) = job.aside()
        assert "it was changed after it was sealed" in why
        job.process.terminate()  # the script dies of it
        assert job.wait(30) == 76, job.output()
        assert job.finish() == 0, job.output()
        assert_equal(job.root / "out/final.pt", expected / "out/final.pt")
        assert job.command("verify", "--full").returncode == 0


def test_a_handler_that_saves_and_leaves(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "plain", "own_nanogpt.py", "--eval_interval=1000")
    with OwnJob(
        tmp_path / "job", "own_nanogpt.py", "--eval_interval=1000", "--pause=0.1", "--handler",
        "--step_file=step", "--replace",
    ) as job:  # fmt: skip
        job.start("--watch", str(job.root / "out/ckpt.pt"), *RESUME)
        job.until(lambda _: (job.root / "step").exists(), "a step")
        before = time.monotonic()
        job.process.terminate()
        assert job.wait(30) == 75, job.output()
        assert time.monotonic() - before < 15
        (sealed,) = job.seals()
        job.arguments[1] = "--pause=0"
        assert job.start(*OVERWRITTEN).wait() == 0, job.output()
        assert "resumed at" in job.output()
        assert sealed.copied
        assert_equal(job.root / "out/final.pt", expected / "out/final.pt")


def test_directories_with_a_marker(tmp_path: Path) -> None:
    """Torn by SIGKILL and set aside before the script's own search; saved on request; on a notice
    the script saves and continues; then the supervisor is killed."""
    expected = undisturbed(tmp_path / "plain", "own_trainer.py", "--max_steps=60")
    with OwnJob(
        tmp_path / "job", "own_trainer.py", "--max_steps=60", "--find", "--tear_at=20",
        "--pause=0.3", "--signal=SIGUSR1", "--save_total_limit=3",
    ) as job:  # fmt: skip
        options = ("--watch", "out/checkpoint-*", "--complete-when", "trainer_state.json",
                   "--on-notice", "signal:SIGUSR1")  # fmt: skip
        job.start(*options)
        job.until(lambda view: view.incarnation == 2, "a restart")
        job.until(lambda _: "resumed from checkpoint-10" in job.output(), "the intact one")
        assert any("trainer_state.json is missing" in why for why in job.aside())
        asked = job.command("save")
        assert asked.returncode == 0, asked.stderr
        assert "out/checkpoint-" in asked.stdout
        drilled = job.command("drill", "--json")
        assert drilled.returncode == 0, drilled.stderr
        assert json.loads(drilled.stdout)["fits"]
        job.process.terminate()
        assert job.wait(30) == 75, job.output()
        newest = job.seals()[0].path
        job.arguments[4] = "--pause=0.03"
        job.start(*options)
        job.until(lambda _: f"resumed from {Path(newest).name}" in job.output(), "the newest")
        tree = job.tree()
        job.process.kill()
        job.process.wait(30)
        assert survivors(tree) == []
        assert job.finish() == 0, job.output()
        assert_equal(job.root / "out/final.pt", expected / "out/final.pt")


@pytest.mark.slow
def test_distributed_checkpoints(tmp_path: Path) -> None:
    """Synchronous and asynchronous ones of two ranks; the seal holds the files of both."""
    expected = undisturbed(tmp_path / "plain", "own_dcp.py", ranks=2)
    with OwnJob(tmp_path / "job", "own_dcp.py", "--pause=0.5", "--tear_at=12", nproc=2) as job:
        job.start("--watch", "out/step-*", "--complete-when", ".metadata",
                  "--resume-args", "--resume {newest}")  # fmt: skip
        job.until(lambda _: "resumed at" in job.output(), "a restart")
        for sealed in job.seals():
            files = {entry.path for entry in sealed.files}
            assert {".metadata", "__0_0.distcp", "__1_0.distcp"} <= files
        job.process.terminate()
        assert job.wait(40) == 75, job.output()
        job.arguments[0] = "--pause=0"
        assert job.start().wait() == 0, job.output()
        assert job.command("verify", "--full").returncode == 0
        for rank in range(2):
            assert_equal(job.root / f"final.{rank}.pt", expected / f"final.{rank}.pt")


@pytest.mark.slow
def test_ddp_by_epochs_with_two_ranks(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "plain", "own_mingpt.py", ranks=2)
    with OwnJob(tmp_path / "job", "own_mingpt.py", "--pause=0.8", nproc=2) as job:
        job.start("--watch", "snapshot.pt")
        job.until_sealed()
        job.workers()[1].kill()
        job.until(lambda view: view.incarnation == 2, "a restart")
        job.until(lambda _: "resumed at epoch" in job.output(), "a resume")
        job.process.terminate()
        assert job.wait(30) == 76, job.output()
        job.arguments[0] = "--pause=0"
        assert job.start("--watch", "snapshot.pt").wait() == 0, job.output()
        assert_equal(job.root / "final.pt", expected / "final.pt")


@pytest.mark.slow
def test_a_best_copy_and_a_resume_by_path(tmp_path: Path) -> None:
    expected = undisturbed(tmp_path / "plain", "own_imagenet.py")
    with OwnJob(tmp_path / "job", "own_imagenet.py", "--pause=0.6") as job:
        options = ("--watch", "checkpoint.pth.tar", "--resume-args", "--resume {newest}",
                   "--finished-when", "final.pt", "--on-notice",
                   "command:echo $ELASTIC_CKPT_PIDS > asked; kill $ELASTIC_CKPT_PIDS")  # fmt: skip
        job.start(*options)
        sealed = job.until_sealed()
        pid = job.workers()[0].pid
        job.process.terminate()
        assert job.wait(30) == 76, job.output()
        assert (job.root / "asked").read_text().split() == [str(pid)]
        best = (job.root / "model_best.pth.tar").read_bytes()
        (job.root / "checkpoint.pth.tar").write_bytes(b"")  # its disk was full
        job.arguments[0] = "--pause=0"
        assert job.start(*options).wait() == 0, job.output()
        assert "resumed at epoch" in job.output()
        assert sealed.path == str(job.root / "checkpoint.pth.tar")
        assert best
        assert_equal(job.root / "final.pt", expected / "final.pt")
        assert job.start(*options).wait() == 0  # nothing is left to do, nothing is launched
        assert "nothing was launched" in job.view().message


@pytest.mark.parametrize("asks", ["notice", slow("should_save")])
def test_ranks_that_ask_leave_after_the_same_step(tmp_path: Path, asks: str) -> None:
    """Neither a loader nor a save of elastic-ckpt's: 75 if what they wrote is watched, else 76."""
    out = tmp_path / "out"
    out.mkdir()
    watch = ["--watch", str(out / "ckpt.pt")]
    with OwnJob(tmp_path / "job", "own_notice.py", asks, str(out), nproc=2) as job:
        for options, code in (([], 76), (watch, 75)):
            before = traced(out, 0)
            job.start(*options)
            job.until(lambda _, n=before: traced(out, 1) > n + 3, "some steps")
            job.process.terminate()
            assert job.wait(30) == code, job.output()
            assert traced(out, 0) == traced(out, 1) == saved_step(out)


def traced(out: Path, rank: int) -> int:
    path = out / f"trace.{rank}"
    return int(path.read_text().split()[-1]) if path.exists() else 0


def saved_step(out: Path) -> int:
    return int(torch.load(out / "ckpt.pt", weights_only=True)["step"])

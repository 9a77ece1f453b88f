"""The hostfile: its syntax, the options it sets, and starting the other hosts over ssh."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from elastic_ckpt.cli.run import hostfile, ssh
from elastic_ckpt.cli.run.command import command, parse
from elastic_ckpt.cli.run.hostfile import Hostfile, hosts_to_start, is_this_machine, read_hostfile
from elastic_ckpt.errors import HostsNotStarted, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.unit.cli.run.test_job_file import printed


@pytest.fixture(autouse=True)
def addresses(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Resolve these names without a name server."""
    known = {"a": "192.0.2.1", "b": "192.0.2.2", "c": "192.0.2.3", "here": "127.0.0.2"}
    known |= {"localhost": "127.0.0.1"}

    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        if host in known or host[0].isdigit():
            return [(hostfile.socket.AF_INET, 2, 17, "", (known.get(host, host), 0))]
        raise OSError("no such name")

    monkeypatch.setattr(hostfile.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(hostfile.socket, "gethostname", lambda: "login")
    monkeypatch.setattr(hostfile.socket, "getfqdn", lambda name="": "login.cluster.org")
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_NODES", "ELASTIC_CKPT_DIR"):
        monkeypatch.delenv(name, raising=False)
    return known


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


# -- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\nb\n", Hostfile(("a", "b"), 0)),
        ("a", Hostfile(("a",), 0)),
        ("\n# two\n  a  # leads\n\nb.cluster.org\r\n", Hostfile(("a", "b.cluster.org"), 0)),
        ("a slots=8\nb\tslots=8\n", Hostfile(("a", "b"), 8)),
        ("10.0.0.1\nfd00::1\nnode_3-x", Hostfile(("10.0.0.1", "fd00::1", "node_3-x"), 0)),
    ],
)
def test_a_hostfile_has_one_host_per_line(tmp_path: Path, text: str, found: Hostfile) -> None:
    assert read_hostfile(write(tmp_path, text)) == found


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a b", r", line 1: 'a b' is neither HOST nor HOST slots=N"),
        ("a\nb slots=0", r", line 2: 'b slots=0' is neither"),
        ("a slots=2 max_slots=4", r", line 1: .* is neither"),
        ("a slots=2x", r", line 1: .* is neither"),
        ("\n-oProxyCommand=x", r", line 2: '-oProxyCommand=x' is neither"),
        ("a;reboot", r", line 1: .* is neither"),
        ("user@a", r", line 1: .* is neither"),
        ("a:22", r", line 1: .* is neither"),
        ("a\nb\n\nA", r", line 4: duplicate host A"),
        ("a slots=2\nb slots=4", r", line 2: slots=N must be the same on all lines"),
        ("a slots=2\nb", r", line 2: slots=N must be the same on all lines"),
        ("a\nb slots=2", r", line 2: slots=N must be the same on all lines"),
        ("", r"is empty: write one host per line"),
        ("# none\n\n", r"is empty"),
    ],
)
def test_an_invalid_line_is_reported_with_its_number(tmp_path: Path, text: str, why: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=rf"--hostfile {path}.*{why}"):
        read_hostfile(path)


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError, match=f"--hostfile {path}: {why}"):
            read_hostfile(path)


# -- options set by the file ------------------------------------------------------------------


def options(path: Path, *more: str) -> dict[str, Any]:
    return parse(["--dir", "/c", "--hostfile", str(path), *more, "--", "t.py"])


def test_the_file_sets_options_that_were_not_given(tmp_path: Path) -> None:
    found = options(write(tmp_path, "a slots=4\nb slots=4\n"))
    assert (found["nnodes"], found["rdzv_endpoint"], found["nproc"]) == ("2", "a", "4")
    assert "hostfile" not in found
    assert options(write(tmp_path, "fd00::1\nb\n"))["rdzv_endpoint"] == "[fd00::1]"


def test_a_flag_overrides_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "a slots=4\nb slots=4\n")
    found = options(path, "--nnodes", "1:2", "--rdzv-endpoint", "x:1", "--nproc", "auto")
    assert (found["nnodes"], found["rdzv_endpoint"], found["nproc"]) == ("1:2", "x:1", "auto")


def test_one_host_runs_alone_unless_more_nodes_may_join(tmp_path: Path) -> None:
    path = write(tmp_path, "a")
    assert (options(path)["nnodes"], options(path)["rdzv_endpoint"]) == ("1", None)
    assert options(path, "--nnodes", "1:4")["rdzv_endpoint"] == "a"


def test_a_job_file_can_name_the_hostfile(tmp_path: Path) -> None:
    write(tmp_path, "a slots=4\nb slots=4\n")
    job = tmp_path / "job.toml"
    job.write_text('dir = "c"\nscript = "t.py"\nhostfile = "hosts"\nrdzv-endpoint = "x:1"\n')
    shown = printed("--config", str(job))
    assert shown["hostfile"] == (f'"{tmp_path}/hosts"', "file")
    assert shown["nnodes"] == ('"2"', "hostfile")
    assert shown["nproc"] == ('"4"', "hostfile")
    assert shown["rdzv-endpoint"] == ('"x:1"', "file")


@pytest.mark.parametrize("first", ["localhost", "here", "127.0.0.1"])
def test_a_loopback_first_host_is_refused(tmp_path: Path, first: str) -> None:
    path = write(tmp_path, f"{first}\nb\n")
    with pytest.raises(UsageError, match=rf"{first} is 127\.0\.0\.\d here, .* --rdzv-endpoint"):
        options(path)
    assert options(path, "--rdzv-endpoint", "127.0.0.1:1")["nnodes"] == "2"


# -- which host starts the others -------------------------------------------------------------


def test_the_first_host_starts_the_others() -> None:
    assert hosts_to_start(("login", "b", "c"), "login", {}) == ("b", "c")
    assert hosts_to_start(("a", "login", "c"), "login", {}) == ()
    assert hosts_to_start(("a", "b"), "login", {}) == ()
    assert hosts_to_start(("login",), "login", {}) == ()


@pytest.mark.parametrize(
    "first",
    ["login", "LOGIN", "login.cluster.org", "localhost", "127.0.0.1", "127.0.0.2", "here"],
)
def test_the_first_host_is_recognized_by_any_of_its_names(first: str) -> None:
    assert hosts_to_start((first, "b"), "some-name", {}) == ("b",)


@pytest.mark.parametrize("other", ["a", "192.0.2.1", "login.elsewhere.org", "nowhere"])
def test_another_machine_is_not_recognized_as_this_one(other: str) -> None:
    assert not is_this_machine(other)
    assert hosts_to_start((other, "b"), "some-name", {}) == ()


def test_a_node_name_in_the_file_takes_precedence() -> None:
    assert hosts_to_start(("a", "b"), "a", {}) == ("b",)
    assert hosts_to_start(("localhost", "b"), "b", {}) == ()


def test_srun_starts_the_hosts_itself() -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_NODES": "2"}
    assert hosts_to_start(("login", "b"), "login", step) == ()
    assert hosts_to_start(("login", "b"), "login", step | {"SLURM_STEP_NUM_NODES": "1"}) == ("b",)
    assert hosts_to_start(("login", "b"), "login", {"SLURM_JOB_ID": "7"}) == ("b",)


# -- the command line on another host ---------------------------------------------------------


def context(*arguments: str) -> click.Context:
    return command.make_context("run", list(arguments))


def test_another_host_gets_the_same_options_whatever_their_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a slots=4\nb slots=4\n")
    job = tmp_path / "job.toml"
    job.write_text(
        'hostfile = "hosts"\nscript = "t.py"\ngrace = 5\nacknowledge = false\n'
        'notice-source = ["aws", "gcp"]\nname = "it\'s"\n'
    )
    monkeypatch.setenv("ELASTIC_CKPT_DIR", "/shared/c d")
    given = ("--config", str(job), "--grace", "60", "--node-name", "x", "--group-access")
    found = context(*given, "--preload", "", "--rdzv-endpoint", "a:1")
    flags = ssh.same_options(found)
    assert sorted(flags) == [
        "--dir=/shared/c d", "--grace=60.0", "--group-access", "--name=it's",
        "--notice-source=aws", "--notice-source=gcp", "--nproc=4", "--preload=",
    ]  # fmt: skip
    own = ["--nnodes=2:2", "--rdzv-endpoint=a:1", "--node-name=b"]
    there = parse([*flags, *own, "--", "t.py"])
    here = parse([*given, "--preload", "", "--rdzv-endpoint", "a:1"])
    differing = {name for name in here if str(here[name]) != str(there[name])}
    assert differing == {"script", "nnodes", "node_name"}
    assert there["script"] == "t.py"


def test_the_command_line_is_quoted_for_a_shell(tmp_path: Path, monkeypatch) -> None:
    """The variables come from standard input, and all output goes to the log."""
    place = tmp_path / 'it\'s "here" $HOME'
    place.mkdir()
    fake = place / "py thon"
    fake.write_text('#!/bin/sh\npwd; printf "%s|" "$@"; echo "$LINES_HERE"; cat; echo end\n')
    fake.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(fake))
    log = place / "b.log"
    line = ssh.shell_line(place, log, ["--name=a 'b'", "--", "t.py", "$(touch x)"])
    variables = ssh.exports({"LINES_HERE": "one\n'two'", "BASH_FUNC_x%%": "()", "HOME": "/none"})
    assert "HOME" not in variables.replace("LINES_HERE", "") and "BASH" not in variables
    done = subprocess.run(
        line, shell=True, input=variables, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    limit = time.monotonic() + 30
    while not (log.exists() and log.read_text().endswith("end\n")) and time.monotonic() < limit:
        time.sleep(0.01)
    words = "-m|elastic_ckpt|run|--name=a 'b'|--|t.py|$(touch x)|"
    assert log.read_text() == f"{place}\n{words}one\n'two'\nend\n"
    assert not (place / "x").exists()


@pytest.mark.parametrize("missing", ["directory", "log", "python"])
def test_something_missing_on_a_host_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    nowhere = str(tmp_path / "nowhere")
    if missing == "python":
        monkeypatch.setattr(sys, "executable", nowhere)
    place = Path(nowhere) if missing == "directory" else tmp_path
    log = Path(nowhere, "log") if missing == "log" else tmp_path / "log"
    done = subprocess.run(
        ssh.shell_line(place, log, ["--help"]),
        shell=True, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode != 0 and nowhere in done.stderr


def test_variables_of_this_host_are_not_sent() -> None:
    own = ("SSH_AUTH_SOCK", "SLURM_PROCID", "SLURMD_NODENAME", "NOTIFY_SOCKET", "PWD", "UID")
    sent = ("PATH", "PYTHONPATH", "NCCL_SOCKET_IFNAME", "DATA", "HF_HOME", "USERNAME")
    text = ssh.exports(dict.fromkeys([*own, *sent], "a b"))
    assert text == "".join(f"export {name}='a b'\n" for name in sent)


def test_more_nodes_than_hosts_are_refused(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a\nb\n")
    with pytest.raises(UsageError, match="--nnodes 3:4 needs more hosts than the 2 of --hostfile"):
        context("--dir", "c", "--hostfile", str(tmp_path / "hosts"), "--nnodes", "3:4", "t.py")


# -- starting ---------------------------------------------------------------------------------


def start(tmp_path: Path, monkeypatch, script: str | None, least: int = 3) -> list[str]:
    """Start b and c with a fake ssh, or without one; return the printed lines."""
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    else:
        (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "ssh").chmod(0o700)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    directory = tmp_path / "job"
    JobDirectory(directory).prepare()
    settings: Any = SimpleNamespace(
        directory=directory,
        args=("--x",),
        nodes=(least, 3),
        endpoint="a",
        gather_seconds=600.0,
        shared_url="",
        env={"OF_JOB_FILE": "its value"},
    )
    said: list[str] = []
    found = context("--dir", str(directory), "--", "t.py", "--x")
    ssh.start_hosts(("b", "c"), found, settings, said.append)
    return said


def test_each_host_is_called_once_with_a_timeout(tmp_path: Path, monkeypatch) -> None:
    said = start(
        tmp_path,
        monkeypatch,
        f'printf "%s\\n" "$@" > {tmp_path}/called.$5; cat > {tmp_path}/input.$5',
    )
    logs = tmp_path / "job" / ".elastic-ckpt" / "hosts"
    assert said == [f"started b, c over ssh; their output is in {logs}"]
    for host in ("b", "c"):
        words = (tmp_path / f"called.{host}").read_text().splitlines()
        assert words[:5] == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host]
        assert "export OF_JOB_FILE='its value'\n" in (tmp_path / f"input.{host}").read_text()
        line = shlex.split(shlex.split(words[5])[-1])
        assert line[line.index("run") + 1 : -1] == [
            f"--dir={tmp_path}/job", "--nnodes=3:3", "--rdzv-endpoint=a", f"--node-name={host}",
            "--", "t.py", "--x",
        ]  # fmt: skip
        assert (logs / f"{host}.log").stat().st_mode & 0o777 == 0o600


def test_a_failed_host_is_reported_with_exit_code_and_log(tmp_path: Path, monkeypatch) -> None:
    script = 'if [ $5 = c ]; then echo "no route" >&2; exit 255; fi'
    log = tmp_path / "job/.elastic-ckpt/hosts/c.log"
    with pytest.raises(HostsNotStarted) as caught:
        start(tmp_path, monkeypatch, script)
    failure = f"c was not started: ssh exited with 255: no route (log: {log})"
    assert (
        str(caught.value)
        == f"{failure}; b will give up after 600 s: fix this, then rerun the same command"
    )
    assert caught.value.exit_code == 70
    assert start(tmp_path, monkeypatch, script, least=2)[0] == failure


def test_a_missing_or_hanging_ssh_is_a_failure(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(HostsNotStarted, match="b was not started: ssh: No such file"):
        start(tmp_path, monkeypatch, None)
    monkeypatch.undo()
    monkeypatch.setattr(ssh, "START_SECONDS", 0.3)
    with pytest.raises(HostsNotStarted, match="b was not started: ssh did not finish within"):
        start(tmp_path, monkeypatch, "exec sleep 60")

"""The command line: exit codes, one-line errors, JSON, and the width of the output."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

import elastic_ckpt
from elastic_ckpt.checkpoint.manifest import FORMAT, FileEntry, fingerprint
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.cli.app import main
from elastic_ckpt.jobdir.node_record import (
    NodeRecord,
    NoticeRecord,
    ProcessIdentity,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.events import EmergencySaved, Saved, StateChanged, Unknown
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.policy.interval import OptimalInterval
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.protocol.slot import Phase
from tests.checkpoints import (
    MODEL,
    change_manifest,
    flip_bit,
    make_attempt,
    make_checkpoint,
    open_job,
    tree,
)

LIST_KEYS = {
    "path", "epoch", "step", "reason", "tier", "bytes", "age_seconds", "intact", "verified", "why",
    "session", "sealed",
}  # fmt: skip
STATUS_KEYS = {
    "job", "state", "supervisor", "workers", "position", "newest_intact", "rejected", "notice",
    "last_save", "restarts", "goodput", "lost_work_seconds",
}  # fmt: skip

IN_PROCESS = """
import sys
from elastic_ckpt.cli.app import main

sys.argv = ["elastic-ckpt", *sys.argv[1:]]
try:
    main()
except SystemExit as leaving:
    print(leaving.code, *sorted({name.partition(".")[0] for name in sys.modules}
          | {name for name in sys.modules if name.startswith("elastic_ckpt.")}), file=sys.stderr)
"""

SAY_WHO = """
import msgspec
from elastic_ckpt.jobdir.node_record import ProcessIdentity

print(msgspec.json.encode(ProcessIdentity.current()).decode())
"""


@dataclass
class Said:
    """The result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Said]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process, through the same ``main`` as the installed script."""
    monkeypatch.delenv("ELASTIC_CKPT_DIR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["elastic-ckpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = capsys.readouterr()
        assert isinstance(leaving.value.code, int)
        return Said(leaving.value.code, said.out, said.err)

    return call


@pytest.fixture
def no_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a supervisor is started."""

    def started(*arguments: object) -> NoReturn:
        raise AssertionError("a supervisor was started")

    monkeypatch.setattr("elastic_ckpt.supervisor.wiring.make_supervisor", started)


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text("")
    return path


def run_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process."""
    inherited = {key: value for key, value in os.environ.items() if key != "ELASTIC_CKPT_DIR"}
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=60,
        check=False,
        env={**inherited, **environment},
    )


def write_record(job: JobDirectory, state: RunState, owner: ProcessIdentity, **more: Any) -> None:
    """Write the record of a supervisor."""
    record = NodeRecord(
        job="tested", run_id="run", node="here", owner=owner, since=time.time(), state=state, **more
    )
    record.write(job.node_record("here"))


def dead_process() -> ProcessIdentity:
    """Return the identity of a process that has exited."""
    said = subprocess.run(
        [sys.executable, "-c", SAY_WHO], check=True, capture_output=True, timeout=60
    )
    return msgspec.json.decode(said.stdout, type=ProcessIdentity)


def assert_one_line_of_error(said: Said) -> None:
    assert said.out == ""
    assert said.err.startswith("elastic-ckpt: error: ")
    assert said.err.count("\n") == 1 and said.err.endswith("\n")


def assert_an_error_with_the_next_command(said: Said) -> None:
    """As every ending of run."""
    error, text, *commands = said.err.splitlines()
    assert said.out == "" and error.startswith("elastic-ckpt: error: ")
    assert text.startswith("elastic-ckpt: next: ")
    assert commands and all(line.startswith(("  elastic-ckpt ", "  cd ")) for line in commands)


# -- wrong usage ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_supervisor")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nproc", "0"], "--nproc '0'"),
        (["--nproc", "-1"], "--nproc '-1'"),
        (["--nproc", "two"], "--nproc 'two'"),
        (["--nproc", "1.5"], "--nproc '1.5'"),
        (["--nproc", "²"], "--nproc"),
        (["--save-interval", "often"], "--save-interval 'often'"),
        (["--save-interval", "-5"], "--save-interval '-5'"),
        (["--save-interval", "10M"], "--save-interval '10M'"),
        (["--save-interval", "s"], "--save-interval 's'"),
        (["--save-interval", "auto", "--mtbf", "often"], "'--mtbf': 'often'"),
        (["--save-interval", "auto", "--mtbf", "0"], "'--mtbf': 0.0"),
        (["--save-interval", "90s", "--mtbf", "6h"], "--save-interval auto"),
        (["--mtbf", "6h"], "--save-interval auto"),
        (["--mirror", "s3://b/j", "--mirror-every", "soon"], "--mirror-every"),
        (["--mirror", "s3://b/j", "--bucket-rate", "50MX"], "write it like 50MB"),
        (["--mirror", "s3://b/j", "--bucket-rate", "0"], "--bucket-rate"),
        (["--grace", "soon"], "--grace"),
        (["--grace", "-1"], "--grace"),
        (["--grace", "nan"], "--grace"),
        (["--grace", "inf"], "--grace"),
        (["--max-failures", "-1"], "--max-failures"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--nproc"], "argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_invalid_flag_of_run_is_64_and_one_line(
    cli: Command, job: JobDirectory, script: Path, flags: list[str], words: str
) -> None:
    """The line names the flag, and nothing is created or started."""
    before = tree(job.root)
    if flags == ["--nproc"]:
        said = cli("run", "--dir", job.root, *flags)
    else:
        said = cli("run", "--dir", job.root, *flags, "--", script)
    assert said.code == 64
    assert_an_error_with_the_next_command(said)
    assert words in said.err
    assert tree(job.root) == before


@pytest.mark.usefixtures("no_supervisor")
def test_a_missing_script_is_64_and_makes_no_directory(cli: Command, tmp_path: Path) -> None:
    """A typo must not create a job."""
    for arguments in ([tmp_path / "absent.py"], [tmp_path], []):
        said = cli("run", "--dir", tmp_path / "new", "--", *arguments)
        assert said.code == 64
        assert_an_error_with_the_next_command(said)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_supervisor")
def test_run_without_a_directory_is_64(cli: Command, script: Path) -> None:
    """The job directory has no default."""
    said = cli("run", "--", script)
    assert said.code == 64
    assert_an_error_with_the_next_command(said)
    assert "--dir" in said.err


@pytest.mark.parametrize(
    "arguments",
    [["frobnicate"], ["--frobnicate"], ["status", "--frobnicate"], ["list", "a", "b"], ["verify"]],
    ids=" ".join,
)
def test_invalid_arguments_are_64_and_one_line(cli: Command, arguments: list[str]) -> None:
    """For every command, instead of click's own 2."""
    said = cli(*arguments)
    assert said.code == 64
    assert_one_line_of_error(said)


def test_invalid_arguments_in_a_separate_process(tmp_path: Path) -> None:
    """A shell gets the same code and the same line."""
    result = run_process("run", "--dir", tmp_path / "job", "--", tmp_path / "absent.py")
    assert result.returncode == 64
    assert_an_error_with_the_next_command(Said(result.returncode, result.stdout, result.stderr))
    assert not (tmp_path / "job").exists()


def test_a_missing_command_is_64_and_points_to_the_help(cli: Command) -> None:
    """One line, since a page of help would hide the error in a batch job's log."""
    said = cli()
    assert said.code == 64
    assert_one_line_of_error(said)
    assert "--help" in said.err


def test_a_missing_command_on_a_terminal_prints_the_help(
    cli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    said = cli()
    assert said.code == 64 and said.out == ""
    assert "Inspect it:" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    "command", [[], ["run"], ["status"], ["list"], ["verify"], ["save"]], ids=" ".join
)
def test_help_exits_with_0(cli: Command, command: list[str]) -> None:
    """On standard output."""
    said = cli(*command, "--help")
    assert said.code == 0 and said.out.startswith("Usage: elastic-ckpt") and said.err == ""


def test_the_version_is_the_package_version() -> None:
    """For ``python -m`` and the installed script."""
    module = run_process("--version")
    script = subprocess.run(
        [str(Path(sys.executable).with_name("elastic-ckpt")), "--version"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (module.returncode, script.returncode) == (0, 0)
    assert module.stdout == script.stdout
    assert elastic_ckpt.__version__ in module.stdout


# -- unusable directories ----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["status", "list", "verify", "save"])
@pytest.mark.parametrize("place", ["missing", "file", "loop"])
def test_an_unreadable_directory_is_73_and_one_line(
    cli: Command, tmp_path: Path, command: str, place: str
) -> None:
    """The line names the path, which is not created."""
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "loop").symlink_to("loop")
    before = tree(tmp_path)
    said = cli(command, tmp_path / place)
    assert said.code == 73
    assert_one_line_of_error(said)
    assert str(tmp_path / place) in said.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["status", "list", "verify"])
def test_the_directory_can_come_from_the_environment(
    cli: Command, job: JobDirectory, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """An argument takes precedence."""
    path = make_checkpoint(job, 10)
    monkeypatch.setenv("ELASTIC_CKPT_DIR", str(job.root))
    assert str(path) in cli(command, "--json").out
    assert cli(command, job.root.parent / "missing").code == 73


@pytest.mark.parametrize("command", ["status", "list", "verify"])
def test_read_only_commands_change_nothing(cli: Command, tmp_path: Path, command: str) -> None:
    """Not even in a directory without a job."""
    make_attempt(open_job(tmp_path / "job"), 20)
    make_checkpoint(JobDirectory(tmp_path / "job"), 10)
    (tmp_path / "empty").mkdir()
    before = tree(tmp_path)
    cli(command, tmp_path / "job")
    cli(command, tmp_path / "empty")
    assert tree(tmp_path) == before


def test_a_run_in_an_unusable_directory_is_73(tmp_path: Path, script: Path) -> None:
    """Without a traceback, in its own process."""
    result = run_process("run", "--dir", script / "below", "--", script)
    assert result.returncode == 73
    assert_an_error_with_the_next_command(Said(result.returncode, result.stdout, result.stderr))


def test_save_without_a_running_job_is_64(cli: Command, job: JobDirectory) -> None:
    """No request is left for the next run."""
    write_record(job, RunState.RUNNING, dead_process())
    said = cli("save", job.root)
    assert said.code == 64
    assert_one_line_of_error(said)
    assert list(job.requests.iterdir()) == []


# -- list -------------------------------------------------------------------------------------


def test_the_list_as_json(cli: Command, job: JobDirectory) -> None:
    """Exactly the documented keys, newest first by number."""
    for step in (9, 100, 10):
        make_checkpoint(job, step, epoch=1, reason="manual")
    (job.checkpoint(1, 100) / MODEL).unlink()
    rows = cli("list", "--json", job.root).json
    assert [row["step"] for row in rows] == [100, 10, 9]
    assert all(set(row) == LIST_KEYS for row in rows)
    bad, good, older = rows
    assert [row["sealed"] for row in rows] == [False, True, True]
    assert (older["intact"], older["why"]) == (None, "")  # its files were not looked at
    assert (bad["intact"], bad["why"]) == (False, f"{MODEL} is missing")
    assert (bad["epoch"], bad["reason"], bad["bytes"]) == (1, None, None)
    manifest = read_manifest(job.checkpoint(1, 10))
    assert good["path"] == str(job.checkpoint(1, 10))
    assert (good["epoch"], good["reason"], good["tier"]) == (1, "manual", "disk")
    assert (good["intact"], good["why"], good["bytes"]) == (True, "", manifest.total_bytes)
    assert 0 <= good["age_seconds"] < 60


def test_an_empty_list(cli: Command, job: JobDirectory) -> None:
    """An empty array as JSON, a sentence otherwise, and no error."""
    assert cli("list", "--json", job.root).json == []
    said = cli("list", job.root)
    assert said.code == 0 and "no checkpoints" in said.out


def test_the_list_as_text(cli: Command, job: JobDirectory) -> None:
    """Newest first with problems, and quarantined checkpoints last."""
    for step in (9, 10, 100):
        make_checkpoint(job, step)
    (job.checkpoint(0, 100) / "manifest.json").unlink()
    set_aside(job, job.checkpoint(0, 9), "was bad")
    said = cli("list", job.root)
    assert said.code == 0
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["100", "10", "9"]
    assert "not sealed" in lines[1] and "intact" in lines[2] and "was bad" in lines[3]


# -- verify -----------------------------------------------------------------------------------


def test_verify_of_a_good_checkpoint_is_0(cli: Command, job: JobDirectory) -> None:
    """For a directory and for one checkpoint, by sizes and by every byte."""
    path = make_checkpoint(job, 10)
    for place in (job.root, path):
        assert cli("verify", place).code == 0
        full = cli("verify", "--full", place)
        assert full.code == 0 and "every byte hashed" in full.out


def test_verify_of_a_bad_checkpoint_is_65(cli: Command, job: JobDirectory) -> None:
    """One bad checkpoint is enough; the others are still verified."""
    make_checkpoint(job, 10)
    bad = make_checkpoint(job, 20)
    (bad / MODEL).unlink()
    said = cli("verify", job.root)
    assert said.code == 65
    assert f"epoch-0_step-20: FAILED: {MODEL} is missing" in said.out
    assert "epoch-0_step-10: intact" in said.out
    assert cli("verify", bad).code == 65
    assert cli("verify", job.checkpoint(0, 10)).code == 0


def test_verify_of_nothing_is_65(cli: Command, job: JobDirectory) -> None:
    """An empty directory holds nothing that could pass."""
    assert cli("verify", job.root).code == 65


def test_only_full_finds_a_flipped_bit(cli: Command, job: JobDirectory) -> None:
    """The quick check only compares sizes."""
    path = make_checkpoint(job, 10)
    flip_bit(path / MODEL)
    assert cli("verify", path).code == 0
    said = cli("verify", "--full", path)
    assert said.code == 65 and "checksum" in said.out


def test_verify_as_json(cli: Command, job: JobDirectory) -> None:
    """The same rows as ``list``."""
    make_checkpoint(job, 10)
    flip_bit(make_checkpoint(job, 20) / MODEL)
    said = cli("verify", "--full", "--json", job.root)
    assert said.code == 65
    assert [(row["step"], row["intact"]) for row in said.json] == [(20, False), (10, True)]
    assert all(set(row) == LIST_KEYS for row in said.json)


def test_quarantine_moves_only_bad_checkpoints(cli: Command, job: JobDirectory) -> None:
    """A directory without a seal is not ours, and a newer version's checkpoint may be good."""
    good = make_checkpoint(job, 10)
    bad = make_checkpoint(job, 20)
    flip_bit(bad / MODEL)
    plain = make_checkpoint(job, 30)
    (plain / "manifest.json").unlink()
    newer = make_checkpoint(job, 40)
    change_manifest(newer, format=FORMAT + 1)
    said = cli("verify", "--full", "--quarantine", job.root)
    assert said.code == 65
    assert [path.exists() for path in (good, bad, plain, newer)] == [True, False, True, True]
    rows = cli("list", "--json", job.root).json
    [aside] = [row for row in rows if row["tier"] == "quarantine"]
    assert (aside["step"], aside["intact"]) == (20, False) and "checksum" in aside["why"]
    assert aside["path"] in said.err
    assert cli("verify", "--full", good).code == 0


def test_quarantine_of_one_checkpoint_leaves_the_others(cli: Command, job: JobDirectory) -> None:
    """Only the named checkpoint is moved."""
    for step in (10, 20):
        (make_checkpoint(job, step) / MODEL).unlink()
    assert cli("verify", "--quarantine", job.checkpoint(0, 20)).code == 65
    assert not job.checkpoint(0, 20).exists() and job.checkpoint(0, 10).exists()


def test_an_unusable_quarantine_is_73_without_a_traceback(cli: Command, job: JobDirectory) -> None:
    """The bad checkpoint stays, and the result is still printed."""
    path = make_checkpoint(job, 10)
    (path / MODEL).unlink()
    job.quarantine.rmdir()
    job.quarantine.write_bytes(b"")
    said = cli("verify", "--quarantine", job.root)
    assert said.code == 73 and "FAILED" in said.out
    assert said.err.startswith("elastic-ckpt: error: ") and said.err.count("\n") == 1
    assert ".quarantine" in said.err
    assert path.is_dir()


def test_a_copied_checkpoint_can_be_verified_under_any_name(
    cli: Command, job: JobDirectory, tmp_path: Path
) -> None:
    """A directory with a seal is a checkpoint, wherever it is."""
    make_checkpoint(job, 10).rename(tmp_path / "best")
    assert cli("verify", "--full", tmp_path / "best").code == 0
    flip_bit(tmp_path / "best" / MODEL)
    assert cli("verify", "--full", tmp_path / "best").code == 65


@pytest.mark.parametrize(
    "command", [["list"], ["list", "--json"], ["verify"], ["verify", "--json"]], ids=" ".join
)
def test_a_file_name_that_is_not_utf_8_is_printed(job: JobDirectory, command: list[str]) -> None:
    """The reason names it in a printable form."""
    path = make_checkpoint(job, 10)
    (path / "modeling" / os.fsdecode(b"caf\xe9.bin")).write_bytes(b"")
    result = run_process(*command, job.root, COLUMNS="200")
    assert result.returncode == (65 if command[0] == "verify" else 0)
    assert "caf" in result.stdout and "not in the manifest" in result.stdout
    assert "Traceback" not in result.stderr


def test_verify_writes_its_result_to_the_journal(cli: Command, job: JobDirectory) -> None:
    """The report uses it."""
    make_checkpoint(job, 10)
    flip_bit(make_checkpoint(job, 20) / MODEL)
    assert cli("verify", job.root).code == 0 and read_journal(job) == []  # sizes alone
    assert cli("verify", "--full", "--quarantine", job.root).code == 65
    told = [(event.name, event.data.get("intact")) for event in read_journal(job)]
    assert told == [("verified", False), ("verified", True), ("quarantined", None)]


# -- status -----------------------------------------------------------------------------------


def test_status_of_a_running_job(cli: Command, job: JobDirectory) -> None:
    """All documented keys, from record, board, journal and checkpoints."""
    board = Board.create(2)
    board.begin_incarnation(3)
    for rank in (0, 1):
        slot = board.rank_slot(rank)
        slot.launched(rank, os.getpid())
        slot.attach(10)
        slot.phase(Phase.TRAINING)
        slot.step(15 + rank, 14 + rank, 1, 8 * (14 + rank))
    make_checkpoint(job, 10)
    (make_checkpoint(job, 12) / MODEL).unlink()
    Journal(job, "here").write(Saved(step=10, reason="interval", seconds=1.5, stall_seconds=0.5))
    me = ProcessIdentity.current()
    write_record(
        job, RunState.RUNNING, me, board=board.path, incarnation=3, failures=1, preemptions=2,
        failures_left=4,
    )  # fmt: skip
    said = cli("status", "--json", job.root)
    view = said.json
    assert said.code == 0
    assert set(view) >= STATUS_KEYS
    assert (view["job"], view["state"]) == ("tested", "running")
    assert view["supervisor"]["pid"] == os.getpid() and view["supervisor"]["alive"] is True
    assert abs(view["supervisor"]["since"] - time.time()) < 60
    assert [worker["rank"] for worker in view["workers"]] == [0, 1]
    worker = view["workers"][1]
    assert {
        "rank", "local_rank", "node", "pid", "phase", "step", "last_beat_seconds", "rss_bytes",
        "cpu_percent", "gpu_bytes",
    } <= set(worker)  # fmt: skip
    assert (worker["local_rank"], worker["node"], worker["pid"]) == (1, "here", os.getpid())
    assert (worker["phase"], worker["step"]) == ("training", 15)
    assert worker["rss_bytes"] > 1e6 and 0 <= worker["last_beat_seconds"] < 60
    # The position of the job is that of its slowest rank.
    assert view["position"] == {"epoch": 1, "step": 14, "sample_start_index": 112}
    newest = view["newest_intact"]
    assert set(newest) == {
        "step", "path", "tier", "bytes", "age_seconds", "reason", "verified",
    }  # fmt: skip
    assert (newest["step"], newest["path"]) == (10, str(job.checkpoint(0, 10)))
    [rejected] = view["rejected"]
    assert rejected == {"path": str(job.checkpoint(0, 12)), "reason": f"{MODEL} is missing"}
    assert view["notice"] is None
    save = view["last_save"]
    assert set(save) == {"reason", "predicted_seconds", "actual_seconds", "stall_seconds", "error"}
    assert (save["reason"], save["actual_seconds"], save["stall_seconds"]) == ("interval", 1.5, 0.5)
    assert view["restarts"] == {"failures": 1, "preemptions": 2, "failures_left": 4}
    assert isinstance(view["lost_work_seconds"], float)


def test_status_shows_the_save_interval_and_its_reason(cli: Command, job: JobDirectory) -> None:
    why = "every 4 min: a save costs 1.3 s and the job fails every 6 h"
    write_record(
        job, RunState.RUNNING, ProcessIdentity.current(), save_interval=OptimalInterval(240.0, why)
    )
    shown = cli("status", "--json", job.root).json["save_interval"]
    assert shown == {"seconds": 240.0, "why": why}
    assert why in cli("status", "-v", job.root).out


def test_a_given_interval_has_no_reason(cli: Command, job: JobDirectory) -> None:
    write_record(job, RunState.RUNNING, ProcessIdentity.current())
    assert cli("status", "--json", job.root).json["save_interval"] is None
    assert "save interval" not in cli("status", "-v", job.root).out


@pytest.mark.parametrize(
    ("predicted", "text"),
    [(3.14, "predicted 3.1 s, took 2.8 s"), (None, "not predicted, took 2.8 s")],
)
def test_status_compares_the_last_emergency_save_with_its_prediction(
    cli: Command, job: JobDirectory, predicted: float | None, text: str
) -> None:
    """In addition to the newest save, which may be a later run's."""
    journal = Journal(job, "here")
    journal.write(Saved(step=10, reason="emergency", seconds=2.5, stall_seconds=2.5))
    journal.write(EmergencySaved(step=10, predicted_seconds=predicted, actual_seconds=2.8))
    write_record(job, RunState.PREEMPTED, ProcessIdentity.current())
    view = cli("status", "--json", job.root).json
    assert view["last_emergency_save"] == {"predicted_seconds": predicted, "actual_seconds": 2.8}
    save = view["last_save"]
    assert (save["predicted_seconds"], save["actual_seconds"]) == (predicted, 2.5)
    assert text in cli("status", "-v", job.root).out
    journal.write(Saved(step=20, reason="interval", seconds=1.0, stall_seconds=1.0))
    view = cli("status", "--json", job.root).json
    assert view["last_save"]["predicted_seconds"] is None
    assert text in cli("status", "--verbose", job.root).out


def test_status_shows_a_notice_and_the_time_left(cli: Command, job: JobDirectory) -> None:
    """A job with a notice is degraded."""
    notice = NoticeRecord("signal", "SIGTERM", time.monotonic() + 100.0)
    write_record(job, RunState.DRAINING, ProcessIdentity.current(), notice=notice)
    said = cli("status", "--json", job.root)
    assert said.code == 1
    shown = said.json["notice"]
    assert (shown["source"], shown["reason"]) == ("signal", "SIGTERM")
    assert 40 < shown["seconds_left"] <= 100
    assert "SIGTERM" in cli("status", job.root).out


@pytest.mark.parametrize(
    "state", [RunState.STARTING, RunState.RUNNING, RunState.DRAINING, RunState.BACKING_OFF]
)
def test_status_of_a_killed_supervisor_is_dead(
    cli: Command, job: JobDirectory, state: RunState
) -> None:
    """State dead, code 2, and the checkpoint that a restart would use."""
    make_checkpoint(job, 10)
    write_record(job, state, dead_process(), board="/proc/1/fd/0")
    said = cli("status", "--json", job.root)
    assert said.code == 2
    assert said.json["state"] == "dead"
    assert said.json["supervisor"]["alive"] is False
    assert said.json["workers"] == []
    assert said.json["newest_intact"]["step"] == 10
    assert said.json["position"] == {"epoch": 0, "step": 10, "sample_start_index": 80}
    people = cli("status", job.root)
    assert people.code == 2 and "rerun the same command" in " ".join(people.out.split())


@pytest.mark.parametrize(
    ("state", "code"),
    [(RunState.FINISHED, 0), (RunState.PREEMPTED, 1), (RunState.FAILED, 2)],
)
def test_status_of_a_run_that_has_ended(
    cli: Command, job: JobDirectory, state: RunState, code: int
) -> None:
    """Its final record counts, although its process is gone."""
    write_record(job, state, dead_process(), message="its final message")
    said = cli("status", "--json", job.root)
    assert (said.code, said.json["state"]) == (code, state.value)
    assert said.json["notice"] is None and said.json["workers"] == []
    people = cli("status", job.root)
    assert people.code == code and "its final message" in people.out


def test_status_of_a_directory_that_never_ran(cli: Command, job: JobDirectory) -> None:
    """Unknown values are null."""
    view = cli("status", "--json", job.root).json
    assert set(view) >= STATUS_KEYS
    for key in ("supervisor", "position", "newest_intact", "notice", "last_save", "goodput"):
        assert view[key] is None, key
    assert (view["workers"], view["rejected"]) == ([], [])
    assert view["state"] not in {state.value for state in RunState}


def test_status_with_an_invalid_board(cli: Command, job: JobDirectory, tmp_path: Path) -> None:
    """Status works without workers, whatever file the record names."""
    for name, data in (("empty", b""), ("odd", b"x" * 4097), ("zeros", b"\0" * 4096)):
        (tmp_path / name).write_bytes(data)
        write_record(job, RunState.RUNNING, ProcessIdentity.current(), board=str(tmp_path / name))
        said = cli("status", "--json", job.root)
        assert (said.code, said.json["workers"]) == (0, []), name


def test_status_of_a_torn_record(cli: Command, job: JobDirectory) -> None:
    """An unreadable record does not cause a traceback."""
    job.node_record("here").write_bytes(b'{"job": "x"')
    make_checkpoint(job, 10)
    assert cli("status", "--json", job.root).json["newest_intact"]["step"] == 10


def test_status_of_a_journal_with_unexpected_values(cli: Command, job: JobDirectory) -> None:
    """Values of another version do not cause a traceback."""
    journal = Journal(job, "here")
    journal.write(StateChanged(state="running"))
    odd = {"step": 1, "reason": None, "seconds": None, "predicted_seconds": "?"}
    journal.write(Unknown(name="saved", data=odd))
    assert cli("status", "--json", job.root).json["last_save"] is not None
    assert cli("status", job.root).code == 2


@pytest.mark.parametrize("command", ["status", "list", "verify"])
def test_brackets_in_a_reason_are_not_markup(cli: Command, job: JobDirectory, command: str) -> None:
    """A reason is plain text, whatever a broken manifest contains."""
    path = make_checkpoint(job, 10)
    files = [*read_manifest(path).files, FileEntry("[/]x/[red]y/../z", 1, "0" * 32, 0)]
    change_manifest(path, files=files, fingerprint=fingerprint(files))
    said = cli(command, job.root)
    assert "[/]x/[red]y" in said.out


# -- terminals and pipes ----------------------------------------------------------------------


@pytest.fixture
def shown(job: JobDirectory) -> Iterator[JobDirectory]:
    """A job with content for every part of the output."""
    make_checkpoint(job, 10)
    (make_checkpoint(job, 123456789) / MODEL).unlink()
    board = Board.create(1)
    slot = board.rank_slot(0)
    slot.launched(0, os.getpid())
    slot.attach(0)
    Journal(job, "here").write(Saved(step=10, reason="interval", seconds=1.5, stall_seconds=0.5))
    notice = NoticeRecord("signal", "SIGTERM", time.monotonic() + 100.0)
    write_record(
        job, RunState.DRAINING, ProcessIdentity.current(), board=board.path, notice=notice,
        message="SIGTERM: saving, 30 s left",
    )  # fmt: skip
    yield job


@pytest.mark.parametrize("command", ["status", "list"])
@pytest.mark.parametrize("columns", ["1", "40", "80", "400", "0", "wide"])
def test_output_at_any_terminal_width(
    cli: Command,
    shown: JobDirectory,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    columns: str,
) -> None:
    """Lines fit the width, and no width is an error."""
    monkeypatch.setenv("COLUMNS", columns)
    said = cli(command, shown.root)
    assert said.code == (0 if command == "list" else 1)
    assert said.err == ""
    if columns in ("40", "80"):
        lines = [line.rstrip() for line in said.out.splitlines()]
        assert max(map(len, (one for one in lines if "  elastic-ckpt" not in one))) <= int(columns)
        assert "\u2026" not in said.out, "something was cut away"
    if columns in ("80", "400"):
        assert "123456789" in said.out


@pytest.mark.parametrize(
    "command", [["status"], ["status", "--json"], ["list"], ["list", "--json"]], ids=" ".join
)
def test_a_closed_pipe_does_not_cause_a_traceback(shown: JobDirectory, command: list[str]) -> None:
    """As with ``| head``: the pipe is closed before the first byte."""
    read, write = os.pipe()
    os.close(read)
    try:
        result = subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", *command, str(shown.root)],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert result.stderr == ""


def test_a_pipe_gets_no_colours(shown: JobDirectory) -> None:
    """Only a terminal gets escape sequences."""
    for command in ("status", "list"):
        result = run_process(command, shown.root, TERM="xterm-256color")
        assert result.stdout and "\x1b" not in result.stdout


@pytest.mark.parametrize("command", ["status", "list"])
def test_no_color_is_honoured(
    cli: Command, shown: JobDirectory, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """NO_COLOR removes colours and keeps the text."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = cli(command, shown.root).out
    monkeypatch.setenv("NO_COLOR", "1")
    plain = cli(command, shown.root).out
    assert colours(coloured) and not colours(plain)
    assert "missing" in plain


def colours(text: str) -> set[str]:
    """Return the colour codes among the escape sequences."""
    codes = {code for run in text.split("\x1b[")[1:] for code in run.partition("m")[0].split(";")}
    return {code for code in codes if code[:1] in {"3", "4", "9"} and len(code) > 1}


# -- the cost of a command ---------------------------------------------------------------------


def test_importing_the_package_does_not_import_torch() -> None:
    """Importing the package is cheap until a name needs torch."""
    result = subprocess.run(
        [sys.executable, "-c", "import elastic_ckpt, sys; print('torch' in sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == "False\n"


@pytest.mark.parametrize(
    "command", [["status"], ["status", "--json"], ["list"], ["list", "--json"], ["verify"],
                ["verify", "--full", "--json"], ["save"], ["--help"]], ids=" ".join
)  # fmt: skip
def test_a_command_does_not_import_torch(job: JobDirectory, command: list[str]) -> None:
    """Nor numpy, the supervisor or the training package; with JSON not even rich."""
    make_checkpoint(job, 10)
    place = [] if command == ["--help"] else [str(job.root)]
    result = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, *command, *place],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    modules = set(result.stderr.splitlines()[-1].split()[1:])
    assert "elastic_ckpt.cli.app" in modules
    heavy = {"torch", "numpy", "colossalai", "safetensors", "asyncio"}
    heavy |= {"elastic_ckpt.training", "elastic_ckpt.supervisor"}
    if "--json" in command:
        heavy |= {"rich"}
    assert not modules & heavy


def test_status_is_not_much_slower_than_its_libraries(job: JobDirectory) -> None:
    """Compared with an interpreter that imports the same libraries."""
    for step in range(10, 60, 10):
        make_checkpoint(job, step)
    write_record(job, RunState.FINISHED, ProcessIdentity.current())
    floor = [sys.executable, "-c", "import click, msgspec, psutil"]
    status = [sys.executable, "-m", "elastic_ckpt", "status", "--json", str(job.root)]

    def best(command: list[str]) -> float:
        times = []
        for _ in range(4):
            began = time.perf_counter()
            subprocess.run(command, capture_output=True, timeout=60, check=True)
            times.append(time.perf_counter() - began)
        return min(times)

    bare, ours = best(floor), best(status)
    assert ours < max(2.0, 5 * bare), f"{ours:.3f} s, against {bare:.3f} s for the libraries alone"

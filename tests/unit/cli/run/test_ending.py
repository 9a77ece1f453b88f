"""However a run ends, its last line is the next command."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click
import pytest

from elastic_ckpt import errors
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.app import main
from elastic_ckpt.cli.run.ending import advised, after_run
from elastic_ckpt.errors import ElasticCkptError, ExitCode, next_steps
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import RunCommand
from elastic_ckpt.protocol.run_state import RunState
from tests.checkpoints import MODEL, make_checkpoint

RERUN = RunCommand(("elastic-ckpt", "run", "--dir", "a b", "t.py"), "/my work")
STATES = {
    ExitCode.FINISHED: RunState.FINISHED,
    ExitCode.PREEMPTED_SAVED: RunState.PREEMPTED,
    ExitCode.PREEMPTED_UNSAVED: RunState.PREEMPTED,
}


def assert_ends_with_a_command(lines: tuple[str, ...]) -> str:
    assert lines[0].startswith("elastic-ckpt: next: ") and not lines[0].endswith("next: ")
    assert len(lines) > 1 and all(line.startswith("  ") for line in lines[1:])
    words = shlex.split(lines[-1])
    assert words[0] in ("elastic-ckpt", "cd")
    return lines[-1].strip()


@pytest.mark.parametrize("code", list(ExitCode))
@pytest.mark.parametrize("command", [RERUN, RunCommand((), "/"), None], ids=["known", "long", ""])
@pytest.mark.parametrize("saved", ["intact", "damaged", ""])
@pytest.mark.parametrize("leads", [True, False])
def test_a_run_that_began(
    job: JobDirectory, code: ExitCode, command: RunCommand | None, saved: str, leads: bool
) -> None:
    if saved:
        make_checkpoint(job, 60)
    if saved == "damaged":
        (job.checkpoint(0, 60) / MODEL).unlink()
    record = NodeRecord(
        job="tested", run_id="1", node="here", owner=ProcessIdentity.current(), since=time.time(),
        state=STATES.get(code, RunState.FAILED), exit_code=code, message="they were left where "
        "they are" if code == ExitCode.USAGE else "ended", command=command,
        head="here" if leads else "there",
    )  # fmt: skip
    record.write(job.node_record("here"))
    last = assert_ends_with_a_command(after_run(job.root, record, 1))
    asks = code in (ExitCode.PREEMPTED_SAVED, ExitCode.PREEMPTED_UNSAVED)
    if asks and command is RERUN and (saved != "damaged" or not leads):
        assert last == RERUN.line()


def all_errors() -> list[Exception]:
    found: list[Exception] = [
        click.BadParameter("no"), click.NoSuchOption("--nprocs"), PermissionError(13, "no", "x"),
    ]  # fmt: skip
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, ElasticCkptError):
            is_save = issubclass(kind, errors.SaveFailed)
            found.append(kind(0, "full") if is_save else kind("what happened"))
    return found


@pytest.mark.parametrize("error", all_errors(), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", [Path("/a b"), BucketUrl.parse("s3://b/j"), None])
@pytest.mark.parametrize("rerun", [RERUN.line(), ""])
def test_a_run_that_did_not_begin(error: Exception, place: object, rerun: str) -> None:
    error.__dict__.clear()
    with pytest.raises(type(error)), advised(place, lambda: rerun):
        raise error
    last = assert_ends_with_a_command(next_steps(error))
    if place is None or isinstance(error, errors.UsageError | click.ClickException):
        assert last == "elastic-ckpt run --help"
    elif isinstance(error, errors.LockHeld):
        assert shlex.split(last) == ["elastic-ckpt", "status", str(place)]


def test_an_error_keeps_the_advice_that_it_has() -> None:
    with pytest.raises(errors.UsageError) as caught, advised("b", str), advised(None, str):
        raise errors.UsageError("no")
    assert next_steps(caught.value)[-1] == "  elastic-ckpt run --help"


def test_a_closed_pipe_is_no_ending() -> None:
    with pytest.raises(BrokenPipeError) as caught, advised("b", str):
        raise BrokenPipeError
    assert next_steps(caught.value) == ()


def test_in_the_journal_the_error_alone_has_its_priority(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("elastic_ckpt.util.journald.is_journal", lambda _: True)
    monkeypatch.setattr("sys.argv", ["elastic-ckpt", "run", "absent.py"])
    with pytest.raises(SystemExit):
        main()
    error, text, command = capfd.readouterr().err.splitlines()
    assert error.startswith("<3>elastic-ckpt: error: ")
    assert text.startswith("elastic-ckpt: next: ") and command == "  elastic-ckpt run --help"

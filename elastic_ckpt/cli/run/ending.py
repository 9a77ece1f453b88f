"""The last lines of ``elastic-ckpt run``, however it ends: what to do next, and the command for it.

A run that began has a record, and the advice is that of ``status``. One that did not begin ends
with an error, which gets its advice from :func:`advised`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import click

from elastic_ckpt.cli.status.advice import Advice, Situation, advise, advise_member
from elastic_ckpt.errors import (
    CheckpointError,
    ElasticCkptError,
    ExitCode,
    LockHeld,
    StopAborted,
    UsageError,
    note_next_steps,
)
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import PROGRAM, command_line, submission

_LOOK_SECONDS: Final = 2.0
"""How long the end of a run waits for its storage, to say what to do next."""


def after_run(directory: Path, record: NodeRecord, least: int) -> tuple[str, ...]:
    """Return the lines after a run that began; bounded, if the storage does not answer.

    Args:
        least: the number of nodes that the job needs.
    """
    found: list[Advice] = []

    def look() -> None:
        with contextlib.suppress(OSError, ElasticCkptError):
            found.append(_advice(JobDirectory(directory), record))

    if record.leads:
        thread = threading.Thread(target=look, name="next", daemon=True)
        thread.start()
        thread.join(_LOOK_SECONDS)
    else:
        found.append(advise_member(record, least))
    status = command_line("status", directory)
    if not found:
        return _marked("the storage does not answer; look later:", (status,))
    text, commands = found[0]
    if not commands:
        text = f"{text}; how it ended:" if text else "see how it ended:"
    return _marked(text, commands or (status,))


def _marked(text: str, commands: Sequence[str]) -> tuple[str, ...]:
    """Return the lines to print: ``elastic-ckpt: next: TEXT``, then a line for each command."""
    return (f"{PROGRAM}: next: {text}", *(f"  {one}" for one in commands))


def _advice(job: JobDirectory, record: NodeRecord) -> Advice:
    from elastic_ckpt.checkpoint.catalog import newest_and_rejected
    from elastic_ckpt.cli.status.view import gather

    view = gather(job)
    if view.advice:
        return Advice(view.advice, view.commands)
    # The disk did not take this run's last record, and has one of a run that goes on.
    newest, rejected = newest_and_rejected(job, record.memory)
    error = view.last_save.error if view.last_save else ""
    unusable = any(not one.is_scripts for one in rejected)
    return advise(job, Situation(record.state.value, record, newest, unusable, error))


@contextlib.contextmanager
def advised(place: object | None, rerun: Callable[[], str]) -> Iterator[None]:
    """Let errors of the block say what to do next.

    Args:
        place: the job's directory or URL; None if it is not known.
        rerun: returns the same command for a shell; empty if it is not known.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (ElasticCkptError, click.ClickException, OSError) as error:
        text, commands = _advice_on(error, place, rerun())
        note_next_steps(error, _marked(text, commands))
        raise


def _advice_on(error: Exception, place: object | None, rerun: str) -> Advice:
    submit = submission()
    verb = "submit it again" if submit else "rerun the same command"
    rerun = submit or rerun
    again = (rerun,) if rerun else ()
    if submit and isinstance(error, UsageError | click.ClickException):
        return Advice(f"correct the job file, then {verb}:", again)
    if isinstance(error, UsageError) and str(error).startswith("--config "):
        text = "correct the job file, whose keys are the options of run, then rerun the command:"
        return Advice(text, again or (command_line("run", "--help"),))
    if isinstance(error, UsageError | click.ClickException) or place is None:
        return Advice("correct the command; its options:", (command_line("run", "--help"),))
    if isinstance(error, LockHeld):
        return Advice("see what it does:", (command_line("status", place),))
    if isinstance(error, CheckpointError):
        return Advice("see why no checkpoint is usable:", (command_line("list", place),))
    if isinstance(error, StopAborted) and again:
        return Advice(f"{verb}:", again)
    code = error.exit_code if isinstance(error, ElasticCkptError) else ExitCode.UNAVAILABLE
    if code == ExitCode.UNAVAILABLE:
        text = f"see what is wrong with it, then {verb}:"
        return Advice(text, (command_line("doctor", place), *again))
    text = f"fix what the message says, then {verb}:"
    return Advice(text, again or (command_line("status", place),))

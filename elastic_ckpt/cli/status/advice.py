"""What to do next about a job, and the commands to type for it."""

from __future__ import annotations

from typing import Final, NamedTuple

from elastic_ckpt.checkpoint.catalog import CheckpointView
from elastic_ckpt.cli.slurm.queue import QUEUED, UNANSWERED, SlurmView
from elastic_ckpt.cli.status.problems import failure_command, save_command
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.node_record import NodeRecord
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.run_command import PROGRAM, command_line
from elastic_ckpt.policy.failure import FailureClass
from elastic_ckpt.protocol.run_state import RunState

RERUN: Final = "rerun the same command"
"""What :mod:`moved` replaces, where the command is not the same."""
_SUBMIT: Final = "submit it again"
_ENDED: Final = (RunState.PREEMPTED.value, RunState.FAILED.value)
_OVER: Final = ("dead", *_ENDED, RunState.FINISHED.value)
_SET_ASIDE: Final = "failed verification"
"""In the message of a run that set too many checkpoints aside."""

FIX_STORAGE: Final = ": fix the storage, then rerun"
"""The beginning of what that message advises."""

_GONE: Final = "is not there any more"
"""In the message of a run whose directory was moved, deleted or unmounted."""

_TAKEN_OVER: Final = "has taken over"
"""In the message of a run that another one has replaced."""

_NOT_STORED: Final = "the work is done, but "
"""In the message of a run that could not store its last checkpoint."""

_WATCHED: Final = "another run on this machine watches"
"""In the message of a run whose script's output another one watches."""

_STUCK: Final = " after SIGKILL, with its GPU "
"""In the message of a run of which a worker could not be killed."""

_AT_ONCE: Final = "SLURM requeues job {} unless it was cancelled or submitted with --no-requeue"
_USAGE: Final = "exit code 2"
"""The message of a rank whose script refused its arguments, as argparse does."""
_SCRIPT: Final = "SCRIPT.py"

_NOT_MOVED: Final = "they were left where they are"
"""In the message of a run that found no checkpoint with the file of --complete-when."""


class Advice(NamedTuple):
    """One sentence, and the commands to type, in this order; empty where there is nothing to do."""

    text: str = ""
    commands: tuple[str, ...] = ()


class Situation(NamedTuple):
    """What the advice depends on.

    Attributes:
        state: as ``status`` shows it.
        record: of the run; None if no supervisor has run.
        newest: the newest intact checkpoint.
        rejected: whether there are checkpoints of a Session that a restart would not load.
        save_error: why the last save failed; empty if it did not.
        slurm: what SLURM says of the job; None if it was not asked, or knows of none.
    """

    state: str
    record: NodeRecord | None
    newest: CheckpointView | None
    rejected: bool
    save_error: str
    slurm: SlurmView | None = None


def advise(job: JobDirectory, found: Situation) -> Advice:
    """Return what to do about a job that has ended; nothing for one that runs."""
    record = found.record
    if (by_slurm := _by_slurm(found)) is not None:
        return by_slurm
    if found.state == "unknown" and (found.newest is not None or not found.rejected):
        there = f": it {_resumes(found)}" if found.newest is not None else ""
        line = command_line("run", "--dir", job.root, "--", _SCRIPT)
        return Advice(f"start it with elastic-ckpt run{there}", (line,))
    if found.state == RunState.FINISHED.value:
        place = found.newest.url or job.root if found.newest is not None else ""
        shown = (command_line("list", place),) if place else ()
        return Advice("nothing is left to do" + "; its checkpoints:" * bool(shown), shown)
    if found.state not in ("unknown", "dead", *_ENDED):
        return Advice()
    if found.newest is None and found.rejected:
        return Advice(
            "a rerun would end the same way, because no checkpoint is intact; see why: "
            "elastic-ckpt list; to start over, take an empty directory",
            (command_line("list", job.root),),
        )
    if record is None:
        return Advice()
    rerun = tuple(filter(None, [record.command.rerun() if record.command else ""]))
    again = f"{_verb(record)}{_place(found)}: it {_resumes(found)}"
    if found.state == RunState.FAILED.value:
        special = _by_message(job, found, record, again, rerun)
        if special is not None:
            return special
    if record.own_trouble is not None and found.newest is None:
        if record.own_trouble.refused:
            text = "correct --complete-when in this command; as it is, it ends with 64:"
            return Advice(text, rerun)
        return Advice(f"if --watch and --complete-when are right, {again}; else correct it", rerun)
    if found.save_error:
        first = "first make saves work, or the same steps are lost again"
        text = f"{first}: the last save failed: {found.save_error}; then {again}"
        return Advice(text, (save_command(job, found.save_error), *rerun))
    if found.state == RunState.FAILED.value:
        return _after_failure(job, record, again, rerun)
    return _without_failure(found, record, again, rerun)


def _without_failure(
    found: Situation, record: NodeRecord, again: str, rerun: tuple[str, ...]
) -> Advice:
    """Return the advice for a run that was preempted or killed."""
    command, preempted = record.command, found.state == RunState.PREEMPTED.value
    if command is None or not command.submit:
        managed = preempted and (command is None or command.is_managed)
        unless = ", unless systemd or SLURM does" if managed else ""
        return Advice(again.replace(RERUN, f"{RERUN}{unless}", 1), rerun)
    if found.slurm is None and preempted:  # as the run ends
        number = command.slurm_job
        text = f"{_AT_ONCE.format(number)}: it {_resumes(found)}; see:"
        return Advice(text, (command_line("status", number),))
    if found.slurm is not None and found.slurm.state == UNANSWERED:
        again = f"if SLURM, which does not answer here, has not requeued it, {again}"
    return Advice(again, rerun)


def _verb(record: NodeRecord) -> str:
    """Return what a person does to run it again."""
    return _SUBMIT if record.command is not None and record.command.submit else RERUN


def _by_slurm(found: Situation) -> Advice | None:
    """Return the advice for a job that SLURM has in its queue, or never started; else None."""
    slurm = found.slurm
    if slurm is None or found.state not in ("unknown", QUEUED, *_OVER):
        return None
    command = found.record.command if found.record else None
    if slurm.waits and slurm.reason == "JobHeldUser":
        text = f"job {slurm.job} is held in SLURM; to let it start, where it {_resumes(found)}:"
        return Advice(text, (f"scontrol release {slurm.job}",))
    if found.state == QUEUED:
        return Advice()
    if slurm.waits:
        again = command is not None and command.slurm_job == slurm.job
        what = f"SLURM has {'requeued' if again else 'queued'} job {slurm.job} ({slurm.shown})"
        return Advice(f"{what}, nothing is to be typed: it {_resumes(found)}")
    if slurm.runs:
        where = f"job {slurm.job} is {slurm.state} in SLURM, and its run begins or ends"
        return Advice(f"{where}: nothing is to be typed")
    if found.state != "unknown" or not slurm.submit:
        return None
    if slurm.state == UNANSWERED:
        return Advice("see whether it is in SLURM's queue:", (f"squeue --job {slurm.job}",))
    text = f"see what SLURM wrote into the job's output, then {_SUBMIT}:"
    return Advice(text, (slurm.submit,))


def _by_message(
    job: JobDirectory, found: Situation, record: NodeRecord, again: str, rerun: tuple[str, ...]
) -> Advice | None:
    """Return the advice for an ending that its message or exit code tells apart; else None."""
    if record.exit_code == ExitCode.DATA:
        return _after_bad_data(job, record, again, rerun)
    if record.exit_code == ExitCode.UNAVAILABLE and _TAKEN_OVER in record.message:
        text = "nothing is to be done here: another run continues the job; see how it is:"
        return Advice(text, (command_line("status", job.root),))
    if _WATCHED in record.message:
        return Advice("stop the other run or change --watch in this command, then rerun it:", rerun)
    if _GONE in record.message:
        text = f"put the directory back, then {_verb(record)}; as it is now, it {_resumes(found)}"
        return Advice(text, rerun)
    if _NOT_MOVED in record.message:
        if record.command is not None and record.command.submit:
            return Advice(f"correct complete-when in the job file, then {_SUBMIT}:", rerun)
        return Advice("correct --complete-when in this command:" if rerun else "", rerun)
    if _NOT_STORED in record.message:
        text = f"fix the storage (elastic-ckpt doctor), then {_verb(record)} on this node, "
        return Advice(
            f"{text}which only stores what is done", (command_line("doctor", job.root), *rerun)
        )
    if _STUCK in record.message:
        return Advice(f"repair what the worker waits for, or restart the machine; {again}", rerun)
    if record.exit_code == ExitCode.USAGE:
        return Advice(f"correct what the message says, then {again}", rerun)
    return None


def _after_failure(
    job: JobDirectory, record: NodeRecord, again: str, rerun: tuple[str, ...]
) -> Advice:
    last = record.last_failure
    if last is not None and last.kind == FailureClass.STORAGE.value:
        doctor = command_line("doctor", job.root)
        return Advice(f"fix the storage (elastic-ckpt doctor), then {again}", (doctor, *rerun))
    if misplaced := _misplaced(record):
        many = len(misplaced) > 1
        what = "are options of run, and must" if many else "is an option of run, and must"
        text = f"{', '.join(misplaced)} {what} stand before the script; correct that in:"
        return Advice(text, rerun)
    shown = [failure_command(record)]
    words, stacks = " ".join(shown[0]), ""
    if last is not None and last.kind == FailureClass.HANG.value and shown[0] != ("report",):
        shown, stacks = [*shown, ("report",)], "; the report shows each rank's stack"
    text = f"see why it failed ({PROGRAM} {words}{stacks}), fix that, then {again}"
    return Advice(text, (*(command_line(*one, job.root) for one in shown), *rerun))


def _misplaced(record: NodeRecord) -> list[str]:
    """Return the options of ``run`` that stand after a script which refused its arguments."""
    last, command = record.last_failure, record.command
    if last is None or command is None or last.message != _USAGE:
        return []
    from elastic_ckpt.cli.run.command import command as run

    own = {flag for one in run.params for flag in one.opts if flag.startswith("--")}
    given = dict.fromkeys(word.partition("=")[0] for word in command.script)
    return [word for word in given if word in own and word != "--help"]


def _after_bad_data(
    job: JobDirectory, record: NodeRecord, again: str, rerun: tuple[str, ...]
) -> Advice:
    if _SET_ASIDE in record.message:
        shown = command_line("list", job.root)
        return Advice(f"fix the storage (elastic-ckpt list), then {again}", (shown, *rerun))
    other = "; to train on other data or state, take an empty directory"
    correct, trained = "correct what the message says does not match", record.trained
    if trained is None or record.command is None:
        return Advice(f"{correct}, then {again}{other}", rerun)
    if trained.argv == record.command.argv:
        changed = ": the command is that of the run before, so what it reads has changed"
        return Advice(f"{correct}{changed}; then {again}{other}", rerun)
    goes_on = again.partition(": ")[2]
    text = f"{correct}; it was trained with the command below, with which {goes_on}{other}"
    return Advice(text, (trained.rerun(),))


def _place(found: Situation) -> str:
    """Return where to rerun it: on the machine whose memory has the newest checkpoint."""
    record, newest = found.record, found.newest
    in_memory = newest is not None and newest.tier == "memory" and record is not None
    if in_memory and record is not None:
        return f" on {record.owner.host} before it reboots"
    several = record is not None and len(record.present) > 1
    submitted = record is not None and record.command is not None and record.command.submit
    return " on each node" if several and not submitted else ""


def _resumes(found: Situation) -> str:
    if found.newest is None:
        record = found.record
        never = record is not None and record.sessionless and not record.saves_itself
        until = ", as each rerun does until the script creates a Session"
        return f"starts at step 0{until * never}"
    if not found.newest.own:
        return f"resumes from {found.newest.title}"
    name, command = found.newest.title, found.record.command if found.record else None
    options = {word.partition("=")[0] for word in command.argv} if command else set()
    if "--watch" in options and not options & {"--resume-args", "--config"}:
        return f"resumes from {name} if the script finds it by itself; else give --resume-args"
    return f"resumes from {name}"


def advise_member(record: NodeRecord, least: int) -> Advice:
    """Return what to do on a node whose run has ended, and which does not lead the job.

    Args:
        least: the number of nodes that the job needs.
    """
    if record.exit_code == ExitCode.FINISHED:
        return Advice("nothing is left to do")
    line = record.command.line() if record.command else ""
    left = f"the others continue if at least {least} {'is' if least == 1 else 'are'} left"
    if record.command is not None and record.command.submit:
        return Advice(f"{left}; SLURM requeues the job if they do not")
    text = f"{left}; to add this node, rerun the same command"
    return Advice(text, (line,) * bool(line))

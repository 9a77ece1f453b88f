"""What SLURM's queue holds of a job: asked, with a bound, for jobs that do not run."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, find_job, has_jobs
from elastic_ckpt.notices.slurm import SlurmUnanswered, fields, scontrol
from elastic_ckpt.protocol.run_state import RunState
from elastic_ckpt.util.text import printable

QUEUED: Final = "queued"
"""The state of a job that SLURM has not started yet, beside those of a run."""

UNANSWERED: Final = "unanswered"
GONE: Final = "gone"
_WAITS: Final = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
_RUNS: Final = frozenset(
    ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT",
     "RESIZING")
)  # fmt: skip
_SECONDS: Final = 5.0


class SlurmView(msgspec.Struct, frozen=True):
    """The SLURM job that will run in the directory, runs there, or ran there last.

    Attributes:
        job: its number, or that of its task of an array.
        state: SLURM's own, as PENDING; ``gone`` if SLURM does not know it any more, and
            ``unanswered`` if SLURM does not answer here.
        reason: SLURM's, for this state; empty for none.
        submit: the command that submitted it; empty if ``slurm submit`` did not.
    """

    job: str
    state: str
    reason: str = ""
    submit: str = ""

    @property
    def waits(self) -> bool:
        """Whether SLURM will start it."""
        return self.state in _WAITS

    @property
    def runs(self) -> bool:
        """Whether it has started, and has not ended yet."""
        return self.state in _RUNS

    @property
    def has_it(self) -> bool:
        """Whether SLURM has the job in its queue, or may have."""
        return self.waits or self.runs or self.state == UNANSWERED

    @property
    def shown(self) -> str:
        """State and reason."""
        return ", ".join(filter(None, (self.state, self.reason)))


def not_begun(slurm: SlurmView) -> tuple[str, str]:
    """Return the state of a job of which no run has begun, as ``status`` shows it, and a line."""
    job = f"job {slurm.job}"
    if slurm.waits:
        why = f" ({slurm.reason})" if slurm.reason else ""
        return QUEUED, f"{job} is queued in SLURM{why}; it has not started yet"
    if slurm.runs:
        return RunState.STARTING.value, f"{job} is {slurm.state} in SLURM; its run has not begun"
    if slurm.state == UNANSWERED:
        return "unknown", f"it was submitted as SLURM {job} and has not started"
    return "unknown", f"SLURM {job} ended before its run began ({slurm.shown})"


class QueuedJob(NamedTuple):
    """A job in the queue, or a task of an array, with what is recorded of it."""

    number: str
    state: str
    reason: str
    job: SlurmJob


def queued_jobs() -> list[QueuedJob]:
    """Return the jobs of this user that SLURM has in its queue and this program has recorded.

    Raises:
        SlurmUnanswered: squeue is missing, or the controller does not answer.
    """
    words = ("squeue", "--noheader", "--array", f"--user={os.getuid()}", "--format=%F %K %T %r")
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
            timeout=_SECONDS, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise SlurmUnanswered(f"squeue: {error}") from None
    found = []
    for line in done.stdout.splitlines():
        number, task, state, reason = [*line.split(None, 3), "", "", "", ""][:4]
        number = f"{number}_{task}" if task.isdecimal() else number
        if (job := find_job(number)) is not None:
            found.append(QueuedJob(number, state, _told(reason), job))
    return found


def conflicting(directories: Collection[Path]) -> QueuedJob | None:
    """Return a job in the queue that uses one of these directories; one that ends does not count.
    None if SLURM does not answer: it will not take a submission either."""
    wanted = {os.path.realpath(one) for one in directories}
    try:
        jobs = queued_jobs()
    except SlurmUnanswered:
        return None
    used = (one for one in jobs if os.path.realpath(one.job.directory) in wanted)
    return next((one for one in used if one.state != "COMPLETING"), None)


def ask_slurm(directory: Path, number: str) -> SlurmView | None:
    """Ask SLURM about the job of a directory; None if no job of SLURM is known for it.

    Args:
        number: of the job that the user means, or that ran there last; empty if unknown.
    """
    if not number and not has_jobs():
        return None
    known = find_job(number)
    submit = known.submit if known is not None else ""
    try:
        place = os.path.realpath(directory)
        here = [one for one in queued_jobs() if os.path.realpath(one.job.directory) == place]
    except SlurmUnanswered:
        return SlurmView(number, UNANSWERED, "", submit) if number else None
    # The one that is meant, else the one that runs, else the next.
    here.sort(key=lambda one: (one.number != number, one.state not in _RUNS))
    if here:
        return SlurmView(here[0].number, here[0].state, here[0].reason, here[0].job.submit)
    return SlurmView(number, *_ended(number), submit) if number else None


def _ended(number: str) -> tuple[str, str]:
    """Return state and reason of a job that is not in the queue."""
    try:
        job = fields(scontrol("-o", "show", "job", number))
    except SlurmUnanswered:
        return GONE, ""
    return job.get("JobState") or GONE, _told(job.get("Reason", ""))


def _told(reason: str) -> str:
    return "" if reason in ("None", "(null)") else printable(reason, 200)

"""The error tree. Each class has the exit code with which ``elastic-ckpt`` ends.

::

    ElasticCkptError                70
    ├── UsageError                  64  wrong options, a missing script, a wrong call of the API
    │   └── EndpointUnknown         64  the host name of --rdzv-endpoint has no address
    ├── DirectoryUnusable           73  the job directory cannot be created, read or written
    │   ├── JobNotBegun             73  SLURM has not begun the job, so there is no directory yet
    │   ├── LockHeld                73  another supervisor owns the job or this node
    │   ├── BucketRefused           73  the bucket is missing, not permitted, or cannot be relied on
    │   └── BucketFailed            73  the bucket does not answer now; an OSError as well
    ├── RunSuperseded               73  another run has taken the job over
    ├── CheckpointError             65
    │   ├── NoUsableCheckpoint      65  checkpoints exist, but none is usable
    │   ├── CannotReshard           65  this plugin on this number of ranks cannot load it
    │   ├── UnsupportedFormat       65  written by a newer elastic-ckpt
    │   └── CheckpointRejected      65  one checkpoint, one reason
    │       └── NotSealed           65  it has no manifest: unfinished, or another program's
    ├── DataMismatch                65  the data set or its order differs from the checkpoint's
    ├── UnequalSteps                70  the ranks would run different numbers of steps
    ├── NonFiniteLoss               70  the script reported an infinite or NaN loss
    ├── SaveFailed                  70  a save failed on a rank; raised on every rank
    │   ├── StorageFailed           70  because the disk is full or does not answer
    │   ├── StateModified           70  because the script modified the state meanwhile
    │   └── LeaderLost              70  because the process that hosts the job's store is gone
    ├── StopAborted                 76  the agreement on a stop step was aborted
    ├── NotAnswered                 70  a running job did not serve a request in time
    ├── HostsNotStarted             70  too few hosts of a hostfile could be started
    ├── UnitsRefused                73  systemd's units were changed by hand, or are in use
    └── SlurmRefused                70  SLURM rejected a submission or a requeue
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import ClassVar, Final


class ExitCode(IntEnum):
    """Exit codes of ``run``; SLURM hooks and systemd units depend on them alone."""

    FINISHED = 0
    USAGE = 64
    DATA = 65
    FAILED = 70
    UNAVAILABLE = 73
    PREEMPTED_SAVED = 75
    PREEMPTED_UNSAVED = 76


class ElasticCkptError(Exception):
    """Base of every expected error; its message is one line that says what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


class UsageError(ElasticCkptError):
    """The command or the API was called wrongly."""

    exit_code = ExitCode.USAGE


class EndpointUnknown(UsageError):
    """The host name of ``--rdzv-endpoint`` has no address, or none yet."""


class DirectoryUnusable(ElasticCkptError):
    """The job directory cannot be created, read or written."""

    exit_code = ExitCode.UNAVAILABLE


class LockHeld(DirectoryUnusable):
    """Another supervisor holds the job's or the node's lock."""


class JobNotBegun(DirectoryUnusable):
    """SLURM has not begun the job, so its directory does not exist yet.

    Args:
        line: what SLURM says of the job.
        has_it: SLURM has it in its queue, or may have.
    """

    def __init__(self, line: str, *, has_it: bool = False) -> None:
        super().__init__(line)
        self.has_it = has_it


class BucketRefused(DirectoryUnusable):
    """No later try can succeed until somebody changes the bucket, the credentials or the URL."""


class BucketFailed(DirectoryUnusable, OSError):
    """A request to a bucket failed; the same may succeed later, or may have succeeded already.

    Args:
        line: what failed and why.
        code: an errno.
    """

    def __init__(self, line: str, code: int = errno.EIO) -> None:
        super().__init__(code, line)

    def __str__(self) -> str:
        return str(self.strerror)


class RunSuperseded(ElasticCkptError):
    """Another run has taken the job over; this one seals nothing any more."""

    exit_code = ExitCode.UNAVAILABLE


class CheckpointError(ElasticCkptError):
    """Something is wrong with the checkpoints of the job."""

    exit_code = ExitCode.DATA


class NoUsableCheckpoint(CheckpointError):
    """Checkpoints exist, but none passes verification."""


class CannotReshard(CheckpointError):
    """Another plugin or number of ranks wrote the checkpoint, and this one cannot load it."""


class UnsupportedFormat(CheckpointError):
    """The checkpoint was written by a newer version of elastic-ckpt."""


class CheckpointRejected(CheckpointError):
    """One checkpoint failed verification; the message is the reason alone."""


class NotSealed(CheckpointRejected):
    """The directory has no manifest: another program wrote it. It is never chosen, nor moved."""


class DataMismatch(ElasticCkptError):
    """The data set or its order differs from the one that the checkpoint was made with."""

    exit_code = ExitCode.DATA


class UnequalSteps(ElasticCkptError):
    """The ranks' loaders have different numbers of steps in this epoch."""


class NonFiniteLoss(ElasticCkptError):
    """The script reported an infinite or NaN loss; to continue would be useless."""


class SaveFailed(ElasticCkptError):
    """A save failed on at least one rank; every rank raises it with that rank's reason.

    Attributes:
        rank: the rank that failed first.
        reason: its error.
        doing: the verb for the message; a load may fail as well.
    """

    def __init__(self, rank: int, reason: str, doing: str = "save") -> None:
        super().__init__(f"rank {rank} could not {doing}: {reason}")
        self.rank = rank
        self.reason = reason
        self.doing = doing


class StorageFailed(SaveFailed):
    """The storage failed; the job itself is fine, and a later save may succeed."""


class StateModified(SaveFailed):
    """The script modified a tensor while it was copied; a save without overlap does not fail."""


class LeaderLost(SaveFailed):
    """The job's key-value store does not answer: the process that hosts it is gone."""


class NodeLost(ElasticCkptError):
    """Another node of the job does not answer, or not as it should."""


class StopAborted(ElasticCkptError):
    """A rank died or the time ran out before the ranks agreed on a stop step."""

    exit_code = ExitCode.PREEMPTED_UNSAVED


class NotAnswered(ElasticCkptError):
    """A running job did not serve a request in time."""


class ReplayFailed(ElasticCkptError):
    """A part of a job could not be trained again."""


class HostsNotStarted(ElasticCkptError):
    """Too few hosts of a hostfile could be started for the job to begin."""


class UnitsRefused(ElasticCkptError):
    """Units of systemd were changed by hand, are in use, or may not be written."""

    exit_code = ExitCode.UNAVAILABLE


class SlurmRefused(ElasticCkptError):
    """SLURM rejected the request; the message contains its error."""


_NEXT_STEPS: Final = "next_steps"


def note_next_steps(error: Exception, lines: tuple[str, ...]) -> None:
    """Keep lines about what to do next with an exception, whatever its class; those that it has
    already stay."""
    error.__dict__.setdefault(_NEXT_STEPS, lines)


def next_steps(error: Exception) -> tuple[str, ...]:
    """Return the lines that are kept with an exception; none if it has none."""
    lines: tuple[str, ...] = error.__dict__.get(_NEXT_STEPS, ())
    return lines

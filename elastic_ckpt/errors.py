"""The error tree. Each class owns the exit code that ``elastic-ckpt`` ends with.

::

    ElasticCkptError                70
    ├── UsageError                  64  wrong flags, a missing script, a wrong call of the API
    ├── DirectoryUnusable           73  the job directory cannot be created, read or written
    │   └── LockHeld                73  another supervisor owns the job or this node
    ├── CheckpointError             65
    │   ├── NoUsableCheckpoint      65  checkpoints exist, none can be used
    │   ├── CannotReshard           65  this plugin on this number of ranks cannot load it
    │   ├── UnsupportedFormat       65  written by a newer elastic-ckpt
    │   └── CheckpointRejected      65  one checkpoint, one reason
    │       └── NotSealed           65  it has no manifest: not ours, or never finished
    ├── DataMismatch                65  the data set or its order is not the one of the checkpoint
    ├── UnequalSteps                70  ranks would run different numbers of steps
    ├── NonFiniteLoss               70  the script reported a loss that is no number
    ├── SaveFailed                  70  a save failed on some rank; raised on every rank
    │   ├── StorageFailed           70  because the disk is full or does not answer
    │   ├── StateChanged            70  because the script wrote to the state meanwhile
    │   └── LeaderLost              70  because the process that hosts the job's store is gone
    ├── StopAborted                 76  the agreement on a stop step was given up
    ├── NotAnswered                 70  a running job did not do what it was asked to
    ├── HostsNotStarted             70  fewer hosts of a hostfile could be started than it takes
    └── SlurmRefused                70  SLURM would not submit a job, or queue it again
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit codes of ``run``; SLURM hooks and systemd units act on these alone."""

    FINISHED = 0
    USAGE = 64
    DATA = 65
    FAILED = 70
    UNAVAILABLE = 73
    PREEMPTED_SAVED = 75
    PREEMPTED_UNSAVED = 76


class ElasticCkptError(Exception):
    """Base of every error that a user can foresee: one line, with what to do."""

    exit_code: ClassVar[ExitCode] = ExitCode.FAILED


class UsageError(ElasticCkptError):
    """The command or the API was called wrongly."""

    exit_code = ExitCode.USAGE


class DirectoryUnusable(ElasticCkptError):
    """The job directory cannot be created, read or written."""

    exit_code = ExitCode.UNAVAILABLE


class LockHeld(DirectoryUnusable):
    """Another supervisor holds the job's or the node's lock."""


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
    """The data set, or its order, is not the one that the checkpoint was made with."""

    exit_code = ExitCode.DATA


class UnequalSteps(ElasticCkptError):
    """The ranks' loaders would give them different numbers of steps in this epoch."""


class NonFiniteLoss(ElasticCkptError):
    """The script reported a loss that is infinite or no number; training on would be in vain."""


class SaveFailed(ElasticCkptError):
    """A save failed on at least one rank; every rank raises it with that rank's reason.

    ``rank`` is the rank that failed first, ``reason`` what it said, ``doing`` what it could not
    do: the storage may fail a load, too.
    """

    def __init__(self, rank: int, reason: str, doing: str = "save") -> None:
        super().__init__(f"rank {rank} could not {doing}: {reason}")
        self.rank = rank
        self.reason = reason
        self.doing = doing


class StorageFailed(SaveFailed):
    """The storage said no; nothing is wrong with the job, and a later save may work."""


class StateChanged(SaveFailed):
    """The script wrote to a tensor while it was being copied; a save that waits does not fail."""


class LeaderLost(SaveFailed):
    """The job's key-value store does not answer: the process that hosts it has gone."""


class StopAborted(ElasticCkptError):
    """A rank died or the time ran out before a stop step was agreed upon."""

    exit_code = ExitCode.PREEMPTED_UNSAVED


class NotAnswered(ElasticCkptError):
    """A running job did not do in time what it was asked to."""


class HostsNotStarted(ElasticCkptError):
    """So many hosts of a hostfile could not be reached that the job cannot begin."""


class SlurmRefused(ElasticCkptError):
    """SLURM would not do it; the message holds what it said."""

"""What the supervisor reaches the world through, so that a simulation can be another world.

``wiring.py`` has the real ones. Nothing behind a port may hold the loop up: a directory on a file
server that has died must not keep a notice from being served.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from elastic_ckpt.checkpoint.memory.generation import Sealed
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.jobdir.node_record import NodeRecord, OwnTrouble
from elastic_ckpt.journal.line import JournalEntry
from elastic_ckpt.policy.hang import Effort
from elastic_ckpt.policy.prediction import Predictor
from elastic_ckpt.protocol.messages import AgentEvent, Command
from elastic_ckpt.protocol.succession import Leader
from elastic_ckpt.supervisor.saves.mirror_port import MirrorPort
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.supervisor.watch.stacks import Stack

if TYPE_CHECKING:
    from elastic_ckpt.journal.journal import Journal
    from elastic_ckpt.protocol.board import Board
    from elastic_ckpt.supervisor.listener import Listener
    from elastic_ckpt.supervisor.systemd import Service

Key = tuple[int, ...]
"""Orders the checkpoints of all sessions of a job; its last number is the step."""

NO_CHECKPOINT: Key = (-1, 0)
"""Sorts before every checkpoint."""


class Clock:
    """The host's clocks."""

    def monotonic(self) -> float:
        """Return seconds that never run backwards; all deadlines are in these."""
        return time.monotonic()

    def monotonic_ns(self) -> int:
        """Return the same in nanoseconds, as the board has it."""
        return time.monotonic_ns()

    def wall(self) -> float:
        """Return seconds since the epoch, for people."""
        return time.time()


class AgentPort(Protocol):
    """A running agent. Sending to a dead one is no error: ``gone`` tells.

    Attributes:
        interval_steps: the save interval that its workers were launched with.
        fd: becomes readable when it has reported something or died.
    """

    interval_steps: int
    fd: int

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def gone(self) -> bool:
        """Whether it has died."""

    @property
    def is_intact(self) -> bool:
        """Whether the sockets that it had at an earlier call are still there: a clean-up of /tmp
        may have removed them. Without them it can launch no workers."""

    def send(self, command: Command) -> None:
        """Send a command; returns at once."""

    def events(self) -> Iterator[AgentEvent]:
        """Yield what it has reported since the last call."""

    def end(self) -> None:
        """Kill it and every process below it; bounded. Called once."""


class DirectoryPort(Protocol):
    """The job directory. A method returns at once unless it states how long it may take."""

    def leader(self) -> Leader | None:
        """Return the newest run, as read since the last call, and read again; None meanwhile."""

    def pass_on(self) -> None:
        """Leave the job to its other nodes at :meth:`close`: the next one need not wait."""

    @property
    def lost(self) -> str:
        """Who has taken the job over from this run; empty while this run owns it."""

    def write_record(self, record: NodeRecord) -> None:
        """Write the node's record soon; only the newest of several counts."""

    def record_incarnation(self, number: int) -> None:
        """Note beside the job's lock which incarnation may seal."""

    def take_save_request(self) -> bool:
        """Return whether ``elastic-ckpt save`` has left a request, and take it."""

    def request_save(self) -> None:
        """Leave such a request."""

    def newest(self) -> Key:
        """Return the newest intact checkpoint as of the last scan; scans run in the background."""

    @property
    def left_behind(self) -> Key | None:
        """Return the newest checkpoint of the directory in which the run started, if that was
        moved, deleted or unmounted; else None."""

    def scan(self) -> None:
        """Scan soon: a checkpoint may have been sealed."""

    def scan_now(self, left: Callable[[], float]) -> Key | None:
        """Scan, and look who owns the job, see ``lost``; wait while ``left`` returns seconds.

        None if the storage does not answer in time.
        """

    def clean_up(self, hurry: Callable[[], bool], spare: str) -> None:
        """Start to seal or remove what a killed run left; ``cleaned`` tells when it is done.

        Args:
            hurry: called from a thread; True leaves the rest to the next start.
            spare: identity of the attempt that a drain of this run is writing.
        """

    @property
    def cleaned(self) -> bool:
        """Whether no clean-up is running."""

    def fall_back(self, why: str, forget: Callable[[Key], bool], session: str) -> None:
        """Start to set a session's newest checkpoint aside if it has an older one.

        Args:
            session: its name; empty for the unnamed one.
            forget: called from a thread with its key; False if it must stay.
        """

    @property
    def fallen_back(self) -> str | None:
        """One line for people, empty if nothing was set aside; None while that is not decided."""

    def cancel_fall_back(self) -> bool:
        """Keep it from happening any more; False if it is being done at this moment."""

    def events(self) -> list[JournalEntry]:
        """Return this node's journal events since the last call, up to a second old."""

    def history(self) -> Iterable[JournalEntry]:
        """Return the whole job's journal; blocks, so only at the start of a run or a reload."""

    def read_predictor(self) -> Predictor:
        """Return what earlier runs learned of save durations; only at the start of a run."""

    def write_predictor(self, predictor: Predictor) -> None:
        """Keep it for the next run, soon."""

    def identity(self) -> str:
        """Return what tells this job directory from others, made on the first call; may block."""

    def known_identities(self, seconds: float) -> tuple[str, ...] | None:
        """Return those of this directory's runs, the newest first, without making one.

        Waits up to ``seconds``, then returns None and goes on reading for the next call.
        """

    def catch_up(self, left: Callable[[], float]) -> None:
        """Read the journal to its end for :meth:`events`; wait while ``left`` returns seconds."""

    def close(self, left: Callable[[], float]) -> None:
        """Finish writing and release the locks; wait while ``left`` returns seconds."""


class MemoryPort(Protocol):
    """The node's memory tier and its drain to the disk; see ``saves/memory_keeper.py``."""

    @property
    def root(self) -> str:
        """Its directory; empty if there is no memory tier."""

    @property
    def bell(self) -> int | None:
        """A descriptor that is readable when a worker has sealed something."""

    @property
    def attempt(self) -> str:
        """Identity of the attempt that a drain is writing; empty if none is."""

    @property
    def over(self) -> bool:
        """Whether all that is in memory is on disk, or has just failed to get there."""

    def begin(self) -> None:
        """Find out what else this job has in memory; once, when notices are being listened to."""

    def serve(self) -> None:
        """Handle what was sealed and what was drained."""

    def hold(self) -> None:
        """Drain nothing until :meth:`hurry`: the ranks write to the disk themselves."""

    def hurry(self) -> None:
        """Drain at normal priority, the newest first, and retry what failed."""

    def hurry_once(self) -> None:
        """Do so for the next drain alone."""

    def calm(self) -> None:
        """Drain at the lowest priority again."""

    def newest_key(self) -> Key:
        """Return the newest generation's key."""

    def forget(self, key: Key | None) -> bool:
        """Drop a checkpoint that the disk has; False if the newest is in memory alone."""

    def not_on_disk(self) -> Sealed | None:
        """Return the newest generation if the disk lacks it."""

    def owed(self) -> Sealed | None:
        """Return what this node, which does not lead, has of the newest generation, until it knows
        that the disk has all of it, or that a node that stays has this."""

    def kept_by_peer(self) -> tuple[Key, str] | None:
        """Return the newest generation's key and the node that keeps what this one had of it; None
        unless this node handed it over, as it leaves."""

    def undrained_bytes(self) -> int | None:
        """Return how much of that generation still has to be copied; None if there is none."""

    def finish_pruning(self, hurry: Callable[[], bool]) -> None:
        """Wait until old checkpoints are deleted, or ``hurry`` returns True."""

    def close(self, *, keep: bool = False, finished: bool = False) -> None:
        """Release the tier, and remove it unless it holds what the disk lacks, or another
        supervisor of this node goes on with it (``keep``). Of a job that has ``finished`` the disk
        has the newest, and a node needs its shares of others no more."""


class OwnPort(Protocol):
    """The checkpoints that the script writes itself; see ``saves/own_watch.py``."""

    @property
    def is_on(self) -> bool:
        """Whether this run watches for any."""

    def start(self) -> None:
        """Start the thread that does the reading; once."""

    def prepare(self, hurry: Callable[[], bool]) -> None:
        """Start to verify the newest and to set aside what is torn; ``prepared`` tells when it is
        done. ``hurry`` is called from a thread; True leaves the rest to the next start."""

    @property
    def prepared(self) -> bool:
        """Whether no :meth:`prepare` is running."""

    @property
    def failed(self) -> str:
        """Why the last :meth:`prepare` failed, so that no script may start; empty if it did not."""

    @property
    def failed_code(self) -> ExitCode:
        """The exit code of a run whose :meth:`prepare` failed."""

    @property
    def is_finished(self) -> bool:
        """Whether the script has left its sign that all work is done."""

    @property
    def has_sign(self) -> bool:
        """Whether the script leaves such a sign; if not, its exit code 0 tells."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """What to append to the script's arguments, after :meth:`prepare`."""

    def launched(self, incarnation: int) -> None:
        """Look out for checkpoints of this incarnation, and seal what becomes complete."""

    def mark(self) -> None:
        """A notice has come: from now on tell what is saved because of it."""

    def ended(self, *, left_well: bool) -> None:
        """No worker runs any more: start to seal what is complete.

        Args:
            left_well: the script ended with code 0, by itself.
        """

    @property
    def settled(self) -> bool:
        """Whether that is done, or has taken too long."""

    @property
    def saved(self) -> bool:
        """Whether a checkpoint is sealed that was begun after :meth:`mark`."""

    @property
    def trouble(self) -> OwnTrouble | None:
        """Why nothing is sealed; None if something is, or may be soon."""

    def newest(self) -> Key:
        """Return the newest one's key."""

    @property
    def newest_name(self) -> str:
        """Its name, for people; empty without one."""

    def newest_marked(self) -> Key:
        """Return that of the newest which was complete at :meth:`mark`, whenever it was sealed."""

    def fall_back(self, why: str) -> str:
        """Set the newest aside if there is an older one; one line for people, else empty. Called
        by the directory's thread while no worker runs."""

    def close(self, seconds: float) -> None:
        """End the thread, within ``seconds``."""


class HostPort(Protocol):
    """This process among the others of its host, and those that watch it."""

    def start(self) -> None:
        """Start the heartbeat and the metrics, and adopt orphans of this process's children."""

    def wait(self, fds: Iterable[int | None], seconds: float) -> None:
        """Wait until one of the descriptors is readable or a thread wakes the loop."""

    def turn(self, agent_pid: int) -> None:
        """Note that the loop has gone round, and reap orphans of earlier agents."""

    def activity(self, pids: Iterable[int]) -> object:
        """Return what changes while these processes do anything."""

    def process_states(self, pids: Iterable[int]) -> Mapping[int, str]:
        """Return each process's state letter in /proc; empty for one that is gone."""

    def send(self, pid: int, number: int) -> None:
        """Send a signal to a process below this one; no error if it is gone."""

    def effort(self, pids: Iterable[int]) -> Effort:
        """Return what silent workers do; takes seconds, so only in ``aside``."""

    def aside(self, work: Callable[[], None]) -> None:
        """Run something that may take seconds in a thread, and wake the loop after it."""

    def stacks(self, pids: Mapping[int, int]) -> Mapping[int, Stack]:
        """Return the stacks of processes by rank; takes seconds, so only in ``aside``."""

    def stop(self) -> None:
        """Stop what :meth:`start` started, at the very end; bounded."""


@dataclass(frozen=True)
class Ports:
    """One run's world.

    Attributes:
        start_agent: starts the agent; called again after it died.
    """

    clock: Clock
    board: Board
    directory: DirectoryPort
    journal: Journal
    memory: MemoryPort
    own: OwnPort
    mirror: MirrorPort
    listener: Listener
    host: HostPort
    service: Service
    start_agent: Callable[[RunSettings], AgentPort]

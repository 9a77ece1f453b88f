"""The keys of a job in an object store, below its URL.

::

    job.json                                identity of the job; created, never replaced
    runs/000007.json                        the owner of claim 7; created, and so the fence
    runs/000007.beat.json                   rewritten while it lives: a count, its end
    runs/000007.seals.json                  rewritten at each seal: its newest of each session
    seals/AGE_ATTEMPT.json                  a manifest: the seal; created
    aside/AGE_ATTEMPT.json                  a seal that was taken away: nothing loads it
    data/000007-ATTEMPT/modeling/...        the files of an attempt of claim 7
    sessions/NAME/seals/, data/             the same of a named session
    left-out/NODE.json                      a node that the job leaves out; deleted to let it in
    history/000007/journal/NODE.jsonl       what people read once the machine is gone; rewritten
    history/000007/nodes/NODE.json          likewise: how each node stands
    history/000007/logs/000003-00001.log    likewise: the end of what rank 1 printed last

AGE counts down in the claim, the epoch and the step: stores list keys in ascending order, so the
newest seal is the first, however many there are. What an earlier owner seals too late sorts behind
everything that the later one has sealed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from elastic_ckpt.checkpoint.manifest import MAX_NUMBER, SealHeader
from elastic_ckpt.errors import CheckpointRejected

JOB: Final = "job.json"
RUNS: Final = "runs/"
LEFT_OUT: Final = "left-out/"
HISTORY: Final = "history/"
"""Copies for people, of each owner its own; nothing rests on them."""

_ATTEMPT: Final = r"[0-9A-Za-z-]{1,64}"
_SEAL = re.compile(
    rf"([0-9]{{18}})-([0-9]{{18}})-([0-9]{{18}})_epoch-[0-9]+_step-[0-9]+_({_ATTEMPT})\.json"
)
_RUN = re.compile(r"runs/([0-9]{6,18})\.json")
_NODE: Final = r"[0-9A-Za-z_-][0-9A-Za-z._-]{0,199}"
_HISTORY = re.compile(
    rf"history/([0-9]{{6,18}})/(?:(journal)/({_NODE})\.jsonl|(nodes)/({_NODE})\.json"
    r"|(logs)/([0-9]{6,18}-[0-9]{5,18})\.log)"
)


@dataclass(frozen=True)
class HistoryKey:
    """The key of a copy for people.

    Attributes:
        kind: ``journal``, ``nodes`` or ``logs``.
        name: of the node; of a log ``INCARNATION-RANK``.
    """

    claim: int
    kind: str
    name: str

    @classmethod
    def parse(cls, key: str) -> HistoryKey | None:
        """Return what a key says; None for any other key."""
        found = _HISTORY.fullmatch(key)
        if found is None:
            return None
        claim, kind, name = (one for one in found.groups() if one is not None)
        return cls(int(claim), kind, name)

    @property
    def key(self) -> str:
        """The key itself; the name in it holds nothing but letters, digits, dots and dashes."""
        name = re.sub(r"[^0-9A-Za-z._-]", "_", self.name)[:200]
        suffix = {"journal": "jsonl", "nodes": "json", "logs": "log"}[self.kind]
        return f"{HISTORY}{self.claim:06d}/{self.kind}/{name}.{suffix}"

    @property
    def worker(self) -> tuple[int, int]:
        """The incarnation and the rank of a log."""
        incarnation, _, rank = self.name.partition("-")
        return int(incarnation), int(rank)


@dataclass(frozen=True)
class SealKey:
    """What the key of a seal says.

    Attributes:
        session: whose it is; empty for the unnamed one.
        claim: number of the owner that sealed it.
    """

    session: str
    claim: int
    epoch: int
    step: int
    attempt: str

    @classmethod
    def of(cls, header: SealHeader, claim: int) -> SealKey:
        """Return that of a checkpoint; CheckpointRejected if its attempt's identity is no key."""
        if not re.fullmatch(_ATTEMPT, header.attempt):
            raise CheckpointRejected("the identity of its attempt can be no key of an object")
        return cls(header.session, claim, header.epoch, header.step, header.attempt)

    @classmethod
    def parse(cls, session: str, key: str) -> SealKey | None:
        """Return what a key says; None for one that no seal has."""
        found = _SEAL.fullmatch(key.rpartition("/")[2])
        if found is None:
            return None
        claim, epoch, step = (MAX_NUMBER - int(number) for number in found.groups()[:3])
        return cls(session, claim, epoch, step, found[4])

    @property
    def key(self) -> str:
        """The key itself."""
        age = "-".join(f"{MAX_NUMBER - n:018d}" for n in (self.claim, self.epoch, self.step))
        return f"{seals_of(self.session)}{age}_{self.name}_{self.attempt}.json"

    @property
    def name(self) -> str:
        """The name that the checkpoint has in a job directory."""
        return f"epoch-{self.epoch}_step-{self.step}"

    @property
    def data(self) -> str:
        """The prefix of its files."""
        return f"{_place(self.session)}data/{self.claim:06d}-{self.attempt}/"

    @property
    def aside(self) -> str:
        """Where its seal goes if nothing may load it any more."""
        return f"{aside_of(self.session)}{self.key.rpartition('/')[2]}"

    @property
    def age(self) -> tuple[int, int, int]:
        """Orders the seals of a session: the newest has the largest."""
        return self.claim, self.epoch, self.step


def seals_of(session: str) -> str:
    """Return the prefix of a session's seals."""
    return f"{_place(session)}seals/"


def aside_of(session: str) -> str:
    """Return the prefix of its seals that were taken away."""
    return f"{_place(session)}aside/"


def data_of(session: str) -> str:
    """Return the prefix of the files of all its attempts."""
    return f"{_place(session)}data/"


def run_key(claim: int) -> str:
    """Return the key of an owner's record."""
    return f"{RUNS}{claim:06d}.json"


def beat_key(claim: int) -> str:
    """Return the key of its beat."""
    return f"{RUNS}{claim:06d}.beat.json"


def told_key(claim: int) -> str:
    """Return the key of what it has told of its seals."""
    return f"{RUNS}{claim:06d}.seals.json"


def number_of(key: str) -> int | None:
    """Return the number of an owner's record; None for any other key."""
    found = _RUN.fullmatch(key)
    return int(found[1]) if found else None


def _place(session: str) -> str:
    return f"sessions/{session}/" if session else ""

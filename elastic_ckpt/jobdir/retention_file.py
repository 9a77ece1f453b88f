"""The rule by which a session's script keeps checkpoints, for the copies in a bucket."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.files import read_bounded, write_atomic


def note_rule(session: JobDirectory, rule: Retention) -> None:
    """Note a session's rule, for :func:`read_rule`; what cannot be written stays as it was."""
    if read_rule(session) == rule:
        return
    with contextlib.suppress(OSError, ElasticCkptError):
        session.require(_path(session).parent)
        write_atomic(_path(session), msgspec.json.encode(rule))


def read_rule(session: JobDirectory) -> Retention:
    """Return a session's rule; that which keeps all if there is none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError, msgspec.MsgspecError, ElasticCkptError):
        if session.owns(_path(session).parent):
            return msgspec.json.decode(read_bounded(_path(session), 4096), type=Retention)
    return Retention()


def _path(session: JobDirectory) -> Path:
    return session.verified.parent / "retention.json"

"""What the head and a member send each other: lines of JSON over one TCP connection.

A member's line is its whole :class:`~.cluster.MemberState`, the head's a :class:`HeadLine`. Each is
sent when something has changed; an empty line is a beat, which shows that the sender is alive.
"""

from __future__ import annotations

from typing import Final

import msgspec

from elastic_ckpt.protocol.cluster import JobState, MemberState

BEAT: Final = b"\n"


class Roster(msgspec.Struct, frozen=True):
    """The roster of one incarnation: the largest part of a job's state, which never changes."""

    incarnation: int
    numbers: tuple[int, ...]


class HeadLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a member has yet to receive.

    Attributes:
        number: the member's, in its first line; else -1.
        roster: the newest incarnation's, in the first line that needs it.
        job: the job's state, without its roster.
    """

    number: int = -1
    roster: Roster | None = None
    job: JobState | None = None


_member_decoder: Final = msgspec.json.Decoder(MemberState)
_head_decoder: Final = msgspec.json.Decoder(HeadLine)


def encode_member(state: MemberState) -> bytes:
    """Encode a member's line."""
    return msgspec.json.encode(state) + b"\n"


def decode_member(line: bytes) -> MemberState:
    """Decode a member's line; ValueError if it is not one."""
    return _member_decoder.decode(line)


def encode_job(job: JobState, number: int = -1, roster: Roster | None = None) -> bytes:
    """Encode the head's line: the job's state, and what else the member has yet to receive."""
    bare = msgspec.structs.replace(job, roster=())
    return msgspec.json.encode(HeadLine(number, roster, bare)) + b"\n"


def decode_job(line: bytes) -> HeadLine:
    """Decode the head's line; ValueError if it is not one."""
    return _head_decoder.decode(line)

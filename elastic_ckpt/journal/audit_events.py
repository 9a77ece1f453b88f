"""The journal's events of an audit (``elastic-ckpt replay``); conventions as in ``events.py``."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from elastic_ckpt.journal.events import Count, JournalEvent, Value

REPLAY: Final = "ELASTIC_CKPT_REPLAY"
"""The variable by which a script sees that it is trained again."""

_MAX_TENSORS: Final = 24 * 1024
Digest = Annotated[str, Meta(max_length=32)]


class StateDigest(JournalEvent, frozen=True, tag="digest"):
    """Digests of what a rank held after a step.

    Attributes:
        sample_start_index, epoch, order: the place in the data, and what its order follows from.
        parameters, optimizer: of all tensors; buffers count as parameters.
        tensors: the beginning of the digest of each, in base64; empty if there are too many.
        norm: of all parameters together.
        device: what has computed it.
    """

    step: Count
    epoch: Count = 0
    sample_start_index: int = 0
    order: Digest = ""
    parameters: Digest = ""
    optimizer: Digest = ""
    tensors: Annotated[str, Meta(max_length=2 * _MAX_TENSORS)] = ""
    norm: Value = 0.0
    loss: Value | None = None
    device: str = ""


class Audited(JournalEvent, frozen=True, tag="audited"):
    """The steps after ``first`` up to ``last`` were trained again, and compared.

    Attributes:
        ranks: how many were compared.
        different: where the first difference is, for people; empty for none. It is at ``at``.
        bounds: why values were compared in place of bits; empty if bits were.
    """

    first: Count
    last: Count
    ranks: Count = 0
    different: str = ""
    at: Count = 0
    bounds: str = ""

    def covers(self, step: int) -> bool:
        """Return whether a step was trained again."""
        return self.first < step <= self.last

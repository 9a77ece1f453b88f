"""The first exchange of a save: are all ranks at one place, with the state that belongs to it, and
which values do they hold differently?"""

from __future__ import annotations

import msgspec

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import DataMismatch, UnequalSteps
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.state.holding import Names, unequal_names


class Arrival(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one rank reports before a save.

    Attributes:
        position: what would be saved.
        ready: whether the state is that of the position.
        model, extra: digests of what a ``Holding`` compares.
    """

    position: Position
    ready: bool = True
    model: bytes = b""
    extra: bytes = b""


class _Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    go: bool = True
    unequal: list[bytes] = []


_decoder = msgspec.json.Decoder(Arrival)
_verdict_decoder = msgspec.json.Decoder(_Verdict)


def meet(peers: Peers, name: str, mine: Arrival) -> Names | None:
    """Return on every rank what differs between ranks; None if a rank is not ready to save.
    Collective.

    Args:
        name: the save in words, with its step, as in "the save after step 7".

    Raises:
        UnequalSteps: on every rank; the ranks are at different epochs, steps or samples.
        DataMismatch: on every rank; their data sets or the seeds of their orders differ.
    """
    verdict = _verdict_decoder.decode(peers.agree(name, msgspec.json.encode(mine), _judge))
    return frozenset(verdict.unequal) if verdict.go else None


def _judge(values: list[bytes]) -> bytes:
    found = [_decoder.decode(value) for value in values]
    if not all(one.ready for one in found):
        return msgspec.json.encode(_Verdict(go=False))
    first = found[0].position
    for rank, one in enumerate(found):
        here = one.position
        if _place(here) != _place(first):
            raise UnequalSteps(
                f"the ranks are at different positions: rank 0 at {_words(first)}, rank {rank} at "
                f"{_words(here)}; nothing was saved: leave each epoch after the same batch on "
                "every rank"
            )
        if _data(here) != _data(first):
            raise DataMismatch(
                f"rank {rank} does not use rank 0's data: it has {here.dataset_size} samples in "
                f"the order of seed {here.order_seed}, rank 0 has {first.dataset_size} of seed "
                f"{first.order_seed}; nothing was saved at step {first.step}: give every rank the "
                "same data set and seed"
            )
    unequal = unequal_names((one.model for one in found), (one.extra for one in found))
    return msgspec.json.encode(_Verdict(unequal=sorted(unequal)))


def _place(position: Position) -> tuple[int, int, int, int]:
    return position.epoch, position.step, position.step_in_epoch, position.sample_start_index


def _data(position: Position) -> tuple[int, int | None, str]:
    return position.dataset_size, position.order_seed, position.dataset_fingerprint


def _words(position: Position) -> str:
    return f"epoch {position.epoch}, step {position.step}, sample {position.sample_start_index}"

"""The exchange that opens a pass over the data: have all ranks the same data, place and length?"""

from __future__ import annotations

import msgspec

from elastic_ckpt.checkpoint.manifest import SealHeader
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import DataMismatch, UnequalSteps
from elastic_ckpt.training.data.fingerprint import DataIdentity, describe_difference
from elastic_ckpt.training.ranks.peers import Peers

_WAY_OUT = "give every rank the whole data set (the sampler divides it) and the same seed"


class Opening(msgspec.Struct, frozen=True):
    """What one rank reports when it opens a pass.

    Attributes:
        batches: micro-batches that are left for it.
        problem: why its data are not the checkpoint's; empty if they are.
    """

    position: Position
    batches: int
    problem: str = ""


_decoder = msgspec.json.Decoder(Opening)
_positions = msgspec.json.Decoder(Position)


def open_pass(peers: Peers, mine: Opening) -> Position:
    """Compare the ranks, and return the leader's position, whose fingerprint counts. Collective.

    Raises:
        DataMismatch: on every rank; a rank has other data than the checkpoint or than rank 0.
        UnequalSteps: on every rank; their positions or numbers of batches differ.
    """
    here = mine.position
    name = f"the batches of epoch {here.epoch} after step {here.step}"
    return _positions.decode(peers.agree(name, msgspec.json.encode(mine), _judge))


def _judge(values: list[bytes]) -> bytes:
    found = [_decoder.decode(value) for value in values]
    for one in found:
        if one.problem:
            raise DataMismatch(one.problem)
    first = found[0].position
    for rank, one in enumerate(found):
        here = one.position
        why = _difference(first, here)
        if why:
            raise DataMismatch(f"rank {rank} does not have rank 0's data: {why}; {_WAY_OUT}")
        if here.sample_start_index != first.sample_start_index:
            raise UnequalSteps(
                f"rank {rank} begins epoch {here.epoch} at sample {here.sample_start_index}, "
                f"rank 0 at {first.sample_start_index}"
            )
    counts = sorted({one.batches for one in found})
    if len(counts) > 1:
        raise UnequalSteps(
            "the ranks' loaders have different numbers of batches "
            f"({' '.join(map(str, counts))}): give every rank the same data set, batch size and "
            "ElasticSampler arguments"
        )
    return msgspec.json.encode(first)


def _difference(first: Position, here: Position) -> str:
    if here.dataset_size != first.dataset_size:
        return f"it has {here.dataset_size} samples, rank 0 has {first.dataset_size}"
    if here.order_seed != first.order_seed:
        return f"its order has seed {here.order_seed}, rank 0's has seed {first.order_seed}"
    if here.dataset_fingerprint == first.dataset_fingerprint:
        return ""
    if here.dataset_fields == first.dataset_fields and here.dataset_fields:
        return ""
    return describe_difference(first.dataset_fields, here.dataset_fields)


def difference_from(saved: SealHeader, now: Position, identity: DataIdentity) -> str:
    """Describe why the data are not the checkpoint's, and the way out; empty if they are."""
    remedy = "use the same data and seed, or start over with a new --dir"
    if saved.dataset_size != now.dataset_size:
        what = f"it has {now.dataset_size} samples instead of {saved.dataset_size}"
    elif saved.order_seed != now.order_seed:
        what = f"its order has seed {now.order_seed} instead of {saved.order_seed}"
    elif not identity.is_same(saved.dataset_fingerprint, saved.dataset_fields):
        what = identity.difference(saved.dataset_fields)
        remedy = (
            "if the data are the same, declare it in the script: "
            f'dataset.fingerprint = "{saved.dataset_fingerprint}"; else {remedy}'
        )
    else:
        return ""
    return f"the data set is not the one of {saved.checkpoint_name}: {what}; {remedy}"

"""The fp32 master weights of mixed precision, which ColossalAI's checkpoints do not contain.

Its optimizers step on an fp32 copy of each bf16 or fp16 weight, sharded by ZeRO. On a load it makes
the copies from the weights, and the rounding is lost: the run continues, but not as it would have.
So each rank writes its pieces next to ColossalAI's files, and restores them after its load.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import distributed
from xxhash import xxh3_64_hexdigest

from elastic_ckpt.checkpoint.tier import Part
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.tensors.safetensors_file import (
    TensorFile,
    layout_of,
    make_header,
    write_file,
)
from elastic_ckpt.training.tensors.state_codec import rejecting
from elastic_ckpt.util.text import printable

DIRECTORY: Final = "precision"

dist: Any = distributed
"""As in :mod:`elastic_ckpt.training.ranks.peers`."""


@dataclass(frozen=True)
class Piece:
    """The masters at one index of the model parallelism, sharded over ``shards`` ranks.

    Attributes:
        index: the parallel index: pipeline stage, tensor rank and experts, ``pp0of2-tp1of4``.
        whole: elements of each parameter before sharding, by name; a master holds one flat shard
            of it, the last one padded.
        written: whether this rank writes the piece; its replicas do not.
    """

    index: str
    shard: int
    shards: int
    masters: dict[str, torch.Tensor]
    whole: dict[str, int]
    written: bool

    @property
    def rest(self) -> str:
        """The index without the pipeline stage, in which a parameter may move."""
        stage, _, rest = self.index.partition("-")
        return rest if stage.startswith("pp") else self.index

    def file(self, shard: int, shards: int) -> str:
        """Return the path of a shard's file."""
        return f"{DIRECTORY}/masters-{self.index}-{shard:05d}-of-{shards:05d}.safetensors"


def save_masters(part: Part, pieces: list[Piece]) -> None:
    """Write the pieces that this rank writes. Not collective."""
    for piece in pieces:
        if not piece.written:
            continue
        header = make_header(layout_of(piece.masters))
        with part.open(piece.file(piece.shard, piece.shards), header.file_bytes) as file:
            write_file(file, header, piece.masters)


def load_masters(checkpoint: Path, pieces: list[Piece]) -> str:
    """Restore the pieces from any number of shards and stages, or return why some stay as they were
    made from the weights. Not collective. CheckpointRejected if they are another model's."""
    lacking: list[str] = []
    with rejecting(f"{DIRECTORY}/ in {checkpoint.name}"), ExitStack() as held:
        saved = {rest: _find_shards(checkpoint, rest, held) for rest in {p.rest for p in pieces}}
        for piece in pieces:
            for name, master in piece.masters.items():
                shards = saved[piece.rest].get(name)
                if shards is None:
                    lacking.append(name)
                else:
                    _fill(master, name, piece, shards)
    if not lacking:
        return ""
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"none was saved for {lacking[0]}{more} as this rank holds it"


def find_pieces(plugin: Any, model: Any, optimizer: Any) -> list[Piece]:
    """Return the pieces of which this rank holds a shard; none if the weights are fp32."""
    if optimizer is None:
        return []
    if hasattr(optimizer, "chunk16_set"):
        return list(_of_gemini(optimizer))
    if not hasattr(optimizer, "get_working_to_master_map"):
        return []
    groups = getattr(optimizer, "pg_to_param_list", None)
    if groups is None:
        return list(_of_replicas(plugin, model, optimizer))
    return list(_of_zero(plugin, model, optimizer, groups))


def _of_zero(plugin: Any, model: Any, optimizer: Any, groups: dict[Any, Any]) -> Iterator[Piece]:
    """Yield ZeRO's pieces: it shards each parameter over its group; experts have their own."""
    expert_group = getattr(plugin, "moe_dp_group", None)
    for group, parameters in groups.items():
        masters, whole = _masters(model, optimizer, parameters)
        if not masters:
            continue
        store = optimizer.pg_to_bucket_store[group]
        experts = expert_group is not None and group is expert_group
        yield Piece(
            index=_parallel_index(plugin, experts=experts),
            shard=int(store.local_rank),
            shards=int(store.world_size),
            masters=masters,
            whole=whole,
            written=True,
        )


def _of_replicas(plugin: Any, model: Any, optimizer: Any) -> Iterator[Piece]:
    """Yield the piece that each data-parallel rank holds whole without ZeRO; the first writes."""
    masters, whole = _masters(model, optimizer, model.unwrap().parameters())
    if masters:
        group = getattr(plugin, "mixed_dp_group", None)
        first = group is None or dist.get_rank(group) == 0
        yield Piece(_parallel_index(plugin, experts=False), 0, 1, masters, whole, written=first)


def _of_gemini(optimizer: Any) -> Iterator[Piece]:
    """Yield Gemini's pieces: it packs parameters into chunks, which fit only the same packing."""
    module = optimizer.module
    chunks = list(dict.fromkeys(module.chunk_manager.get_chunk(p) for p in module.param2name))
    packed = [([module.param2name[p] for p in chunk.get_tensors()], chunk) for chunk in chunks]
    group, extra = module.zero_group, module.extra_dp_group
    layout = repr(
        [(names, chunk.chunk_size, dist.get_world_size(group)) for names, chunk in packed]
    )
    index = f"gemini-{xxh3_64_hexdigest(layout.encode())}-tp{optimizer.tp_rank}"
    first = extra is None or dist.get_rank(extra) == 0
    for kept_whole in (False, True):  # on every rank
        masters = {
            names[0]: chunk.paired_chunk.payload
            for names, chunk in packed
            if chunk.keep_gathered is kept_whole and chunk.paired_chunk is not None
        }
        if not masters:
            continue
        shards = 1 if kept_whole else dist.get_world_size(group)
        yield Piece(
            index=f"{index}-whole" if kept_whole else index,
            shard=0 if kept_whole else dist.get_rank(group),
            shards=shards,
            masters=masters,
            whole={name: master.numel() * shards for name, master in masters.items()},
            written=first and (not kept_whole or dist.get_rank(group) == 0),
        )


def _masters(model: Any, optimizer: Any, parameters: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the masters whose type differs from their parameter's, and the sizes, by name."""
    names = {id(p): name for name, p in model.unwrap().named_parameters()}
    known = optimizer.get_working_to_master_map() or {}
    masters: dict[str, Any] = {}
    whole: dict[str, int] = {}
    for parameter in parameters:
        master = known.get(id(parameter))
        if master is not None and master.dtype != parameter.dtype:
            name = names[id(parameter)]
            masters[name], whole[name] = master.data, parameter.numel()
    return masters, whole


def _parallel_index(plugin: Any, *, experts: bool) -> str:
    axes = {"pp": "pp_group", "tp": "tp_group", **({"ep": "ep_group"} if experts else {})}
    parts = []
    for axis, name in axes.items():
        group = getattr(plugin, name, None)
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        parts.append(f"{axis}{rank}of{size}")
    return "-".join(parts)


class _Shards:
    """The shards of one index, opened on demand: a rank mostly needs its own."""

    def __init__(self, first: Path, count: int, held: ExitStack) -> None:
        self._first, self._held = first, held
        self._open: dict[int, TensorFile] = {}
        self.count = count

    def file(self, shard: int) -> TensorFile:
        """Open a shard; CheckpointRejected if it is missing, and as :class:`TensorFile`."""
        if shard not in self._open:
            name = self._first.name.replace("-00000-of-", f"-{shard:05d}-of-")
            path = self._first.with_name(name)
            if not path.is_file():
                raise CheckpointRejected(f"{DIRECTORY}/{printable(name, 200)} is missing")
            self._open[shard] = TensorFile(path)
            self._held.callback(self._open[shard].close)
        return self._open[shard]


def _find_shards(checkpoint: Path, rest: str, held: ExitStack) -> dict[str, _Shards]:
    """Return the shards of each parameter, from whichever stage it was in."""
    found: dict[str, _Shards] = {}
    pattern = re.compile(rf"masters-(?:pp\d+of\d+-)?{re.escape(rest)}-00000-of-(\d+)\.safetensors")
    for path in sorted((checkpoint / DIRECTORY).glob("masters-*-00000-of-*.safetensors")):
        match = pattern.fullmatch(path.name)
        if match and int(match[1]):
            shards = _Shards(path, int(match[1]), held)
            found |= dict.fromkeys(shards.file(0).tensors, shards)
    return found


def _fill(master: torch.Tensor, name: str, piece: Piece, shards: _Shards) -> None:
    """Copy this rank's part of a parameter from the shards. CheckpointRejected, KeyError or
    ValueError if they are not this parameter's."""
    size = master.numel()
    if not size:
        return
    step = -(-piece.whole[name] // shards.count)
    mine = torch.zeros(size, dtype=master.dtype)  # the padding after a parameter's end is zero
    begin = piece.shard * size
    for index in range(begin // step, min(-(-(begin + size) // step), shards.count)):
        stored = shards.file(index).tensors[name]
        if prod(stored.shape) != step:
            raise ValueError(f"{name} has another size")
        if stored.dtype != master.dtype:
            raise ValueError(f"{name} has another dtype")
        start, end = max(begin, index * step), min(begin + size, (index + 1) * step)
        offset = stored.begin + (start - index * step) * master.element_size()
        shards.file(index).read_into(offset, mine[start - begin : end - begin])
    with torch.no_grad():
        master.copy_(mine.view(master.shape))

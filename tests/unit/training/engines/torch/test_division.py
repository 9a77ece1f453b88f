"""Who writes what follows from what all ranks have said, and is the same on each of them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.errors import SaveFailed
from elastic_ckpt.training.engines.torch import planned_files
from elastic_ckpt.training.engines.torch.division import (
    Assigned,
    HeldTensors,
    assign,
    needed_tables,
)
from elastic_ckpt.training.engines.torch.state import PartState
from elastic_ckpt.training.tensors.local_box import TensorBox
from elastic_ckpt.training.tensors.shard_index import ShardIndex, what_is_wrong
from elastic_ckpt.training.tensors.shard_reader import ShardReader
from tests.unit.training.tensors.write_tensors import write_tensors

dist: Any = distributed


def rows(shape: tuple[int, ...], part: int, of: int) -> TensorBox:
    """Return a part of the rows, as torch's ``Shard(0)`` cuts them."""
    each = -(-shape[0] // of)
    first = min(shape[0], part * each)
    count = min(each, shape[0] - first)
    return TensorBox((first, *[0] * (len(shape) - 1)), (count, *shape[1:]))


SHAPES = {"part/a": (8, 3), "part/b": (8, 3), "part/bias": (5,), "part/wide": (2, 16)}


def holding(rank: int, shards: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> HeldTensors:
    """Return what a rank holds of tensors whose rows are sharded; every ``shards`` ranks have all
    of them."""
    groups = list(dict.fromkeys(shapes.values()))
    table = {name: ("F32", shapes[name], groups.index(shapes[name])) for name in sorted(shapes)}
    return HeldTensors(table, [rows(shape, rank % shards, shards) for shape in groups])


def assigned_of(holdings: list[HeldTensors]) -> dict[str, Assigned]:
    offers = [one.offer() for one in holdings]
    return assign(offers, {r: holdings[r].encoded_table() for r in needed_tables(offers)})


def index_of(assigned: dict[str, Assigned], shapes: dict[str, tuple[int, ...]]) -> ShardIndex:
    tensors = {path.split("/")[1]: torch.empty(shape) for path, shape in shapes.items()}
    states = {"part": PartState({}, tensors, frozenset())}
    names = planned_files.names_in_files(assigned)
    data = planned_files.indexes_of(assigned, names, states)["part/index.json"]
    return msgspec.json.decode(data, type=ShardIndex)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("few", [0, 64], ids=["shared", "listed"])
def test_each_element_is_written_once_and_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replicas: int, few: int
) -> None:
    monkeypatch.setattr(planned_files, "FEW_SHARDS", few)
    world = 4 * replicas
    assigned = assigned_of([holding(rank, 4) for rank in range(world)])
    index = index_of(assigned, SHAPES)
    assert what_is_wrong(index) == ""
    assert bool(index.cuts) is (few == 0)
    values = {
        path: torch.arange(prod(shape)).reshape(shape) + 0.5 * number
        for number, (path, shape) in enumerate(SHAPES.items())
    }
    part = DiskPart(tmp_path, "tested", 0)
    names = planned_files.names_in_files(assigned)
    for rank in range(world):
        for file in planned_files.files_of(assigned, names, rank):
            held = {}
            for inside, name in file.names.items():
                one = assigned[f"part/{name}"]
                boxes = zip(one.division.boxes, one.writers.tolist(), strict=True)
                (box,) = [box for box, writer in boxes if writer == rank]
                held[inside] = values[f"part/{name}"][
                    tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
                ]
            with part.open(file.path.split("/")[1]) as sink:
                write_tensors(sink, held)
    part.write("index.json", msgspec.json.encode(index))
    targets = {path: torch.zeros(shape) for path, shape in SHAPES.items()}
    with ShardReader(tmp_path) as reader:
        reader.read([(path.split("/")[1], target) for path, target in targets.items()])
    for path, target in targets.items():
        assert torch.equal(target, values[path].to(torch.float32))


def test_replicas_share_the_bytes_evenly() -> None:
    shapes = {f"part/{number}": (64, 8) for number in range(12)}
    assigned = assigned_of([holding(rank, 2, shapes) for rank in range(8)])
    written: Counter[int] = Counter()
    for one in assigned.values():
        for box, writer in zip(one.division.boxes, one.writers.tolist(), strict=True):
            assert box == rows((64, 8), writer % 2, 2)
            written[writer] += 4 * prod(box.sizes)
    assert set(written.values()) == {12 * 64 * 8 * 4 // 8}


def test_an_unequal_load_is_evened_out_by_what_several_hold() -> None:
    """Rank 0 alone has a large tensor: the other one writes what both have."""
    both = {"part/small": ("F32", (4,), 0)}
    whole = [TensorBox((0,), (4,)), TensorBox((0,), (100,))]
    first = HeldTensors({**both, "part/large": ("F32", (100,), 1)}, whole)
    assigned = assigned_of([first, HeldTensors(both, whole[:1])])
    assert assigned["part/large"].writers.tolist() == [0]
    assert assigned["part/small"].writers.tolist() == [1]


def test_tables_are_needed_only_where_they_differ() -> None:
    same = [holding(rank, 4) for rank in range(4)]
    assert needed_tables([one.offer() for one in same]) == [0]
    other = HeldTensors({**same[0].table, "part/more": ("F32", (3,), 3)}, same[0].boxes)
    offers = [one.offer() for one in (other, same[1], same[2], other)]
    assert needed_tables(offers) == [0, 1]


def test_the_order_in_which_ranks_list_their_groups_does_not_matter() -> None:
    one = holding(1, 2)
    swapped = {
        name: (d, shape, {0: 1, 1: 0}.get(g, g)) for name, (d, shape, g) in one.table.items()
    }
    other = HeldTensors(swapped, [one.boxes[1], one.boxes[0], one.boxes[2]])
    expected = assigned_of([holding(0, 2), one])
    found = assigned_of([holding(0, 2), other])
    for name, tensor in expected.items():
        assert found[name].writers.tolist() == tensor.writers.tolist()
        assert found[name].division.boxes == tensor.division.boxes


@pytest.mark.parametrize("change", [{"dtype": "F16"}, {"shape": (9, 3)}], ids=["dtype", "shape"])
def test_ranks_that_describe_a_tensor_differently_fail_the_save(change: dict[str, Any]) -> None:
    one, other = holding(0, 2), holding(1, 2)
    dtype, shape, group = other.table["part/b"]
    other.table["part/b"] = change.get("dtype", dtype), change.get("shape", shape), group
    with pytest.raises(SaveFailed, match=r"part/b has another shape or dtype") as caught:
        assigned_of([one, one, other])
    assert caught.value.rank == 2


def test_a_tensor_that_rank_0_lacks_fails_the_save() -> None:
    more = {**SHAPES, "part/z": (4, 4)}
    assigned = assigned_of([holding(0, 2), holding(1, 2, more)])
    with pytest.raises(SaveFailed, match="another rank has part/z"):
        index_of(assigned, SHAPES)


def test_a_part_that_no_rank_holds_fails_the_save() -> None:
    assigned = assigned_of([holding(0, 3), holding(1, 3)])
    with pytest.raises(SaveFailed, match="do not cover it exactly once"):
        index_of(assigned, SHAPES)


def test_shards_of_tensors_with_odd_names_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name may look like that of another one's shard, or be the format's own."""
    monkeypatch.setattr(planned_files, "FEW_SHARDS", 0)
    names = ["x", "x@4,0", "x@4,0_", "__metadata__", "__metadata___", "x@"]
    shapes = {f"part/{name}": (8, 3) for name in names}
    assigned = assigned_of([holding(rank, 2, shapes) for rank in range(2)])
    index = index_of(assigned, shapes)
    assert what_is_wrong(index) == ""
    shards = [index.shard(name, number) for name in names for number in range(2)]
    assert len({(shard.file, shard.name) for shard in shards}) == len(shards)
    planned = planned_files.files_of(assigned, planned_files.names_in_files(assigned), 1)
    assert {shard.name for shard in shards if shard.file == "00001.safetensors"} == {
        *planned[0].names
    }
    assert "__metadata__" not in planned[0].names


# -- what this rank holds -------------------------------------------------------------------------


@pytest.fixture(params=range(4))
def rank_of_four(request: pytest.FixtureRequest) -> Iterator[int]:
    """One rank of four, without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=request.param, world_size=4)
    yield request.param
    dist.destroy_process_group()


def test_a_rank_says_where_its_shards_lie(rank_of_four: int) -> None:
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    shape = (5, 4)

    def sharded(box: TensorBox, mesh: Any, placements: list[Any]) -> DTensor:
        return DTensor.from_local(
            torch.zeros(box.sizes), mesh, placements, run_check=False,
            shape=torch.Size(shape), stride=(4, 1),
        )  # fmt: skip

    by_four, by_two = rows(shape, rank_of_four, 4), rows(shape, rank_of_four % 2, 2)
    whole = TensorBox((0, 0), shape)
    found = HeldTensors.of({
        "part/line": sharded(by_four, line, [Shard(0)]),
        "part/also": sharded(by_four, line, [Shard(0)]),
        "part/square": sharded(by_two, square, [Replicate(), Shard(0)]),
        "part/copied": sharded(whole, line, [Replicate()]),
        "part/plain": torch.zeros(shape),
    })  # fmt: skip
    boxes = {name: found.boxes[group] for name, (_, _, group) in found.table.items()}
    assert boxes == {
        "part/line": by_four, "part/also": by_four, "part/square": by_two, "part/copied": whole,
        "part/plain": whole,
    }  # fmt: skip
    groups = {name: group for name, (_, _, group) in found.table.items()}
    assert groups["part/line"] == groups["part/also"]
    for one, other in itertools.combinations(
        ("part/line", "part/square", "part/copied", "part/plain"), 2
    ):  # though their boxes are the same on some ranks
        assert groups[one] != groups[other]

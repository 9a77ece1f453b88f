"""A box of a tensor is put together from whichever shards it crosses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.tensors.safetensors_file import DTYPES
from elastic_ckpt.training.tensors.shard_reader import ShardReader
from tests.unit.training.tensors.write_tensors import write_tensors

dist: Any = distributed

Box = tuple[list[int], list[int]]
"""Offsets and sizes."""

LAYOUTS: dict[str, list[Box]] = {
    "whole": [([0, 0], [5, 6])],
    "rows": [([0, 0], [2, 6]), ([2, 0], [1, 6]), ([3, 0], [2, 6])],
    "columns": [([0, 0], [5, 1]), ([0, 1], [5, 3]), ([0, 4], [5, 2])],
    "boxes": [([0, 0], [3, 4]), ([0, 4], [3, 2]), ([3, 0], [2, 1]), ([3, 1], [2, 5])],
}

FILES = {0: "00000.safetensors", 1: "00001.safetensors"}


def save(
    directory: Path, tensors: dict[str, tuple[torch.Tensor, list[Box]]], *, shared: bool = False
) -> Path:
    """Write the boxes in turn into two files, and an index of them; ``shared`` as an index of many
    ranks has them, each way to cut a shape once."""
    files: dict[int, dict[str, torch.Tensor]] = {0: {}, 1: {}}
    index = {}
    for name, (tensor, boxes) in tensors.items():
        shards = []
        for number, (offsets, sizes) in enumerate(boxes):
            box = tuple(
                slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True)
            )
            inside = f"{name}@{','.join(map(str, offsets))}"
            inside = name if sizes == list(tensor.shape) else inside
            files[number % 2][inside] = tensor[box]
            shards.append(
                {"file": FILES[number % 2], "name": inside, "offsets": offsets, "sizes": sizes}
            )
        index[name] = {
            "dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "shards": shards,
        }  # fmt: skip
    part = DiskPart(directory, "tested", 0)
    for number, held in files.items():
        with part.open(FILES[number]) as file:
            write_tensors(file, held)
    whole = as_shared(index) if shared else {"tensors": index}
    part.write("index.json", json.dumps(whole).encode())
    return directory


def as_shared(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return an index whose tensors refer to their shards."""
    index: dict[str, Any] = {"tensors": {}, "cuts": [], "ranks": []}
    for name, entry in tensors.items():
        shards = entry.pop("shards")
        cut = {key: [shard[key] for shard in shards] for key in ("offsets", "sizes")}
        ranks = [int(shard["file"].partition(".")[0]) for shard in shards]
        for value, known in ((cut, index["cuts"]), (ranks, index["ranks"])):
            if value not in known:
                known.append(value)
        numbers = {"cut": index["cuts"].index(cut), "ranks": index["ranks"].index(ranks)}
        index["tensors"][name] = entry | numbers
    return index


def table(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(30).reshape(5, 6).to(dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_a_whole_tensor_is_assembled_from_its_shards(
    tmp_path: Path, layout: str, dtype: torch.dtype, shared: bool
) -> None:
    save(tmp_path, {"w": (table(dtype), LAYOUTS[layout])}, shared=shared)
    target = torch.zeros(5, 6, dtype=dtype)
    with ShardReader(tmp_path) as reader:
        reader.read([("w", target)])
    assert torch.equal(target, table(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "target",
    [torch.zeros(6, 5).t(), torch.zeros(10, 12)[::2, ::2], torch.zeros(6, 6)[1:]],
    ids=["transposed", "with gaps", "behind something"],
)
def test_a_target_of_any_memory_layout_is_filled(
    tmp_path: Path, layout: str, target: torch.Tensor
) -> None:
    save(tmp_path, {"w": (table(), LAYOUTS[layout])})
    with ShardReader(tmp_path) as reader:
        reader.read([("w", target)])
    assert torch.equal(target, table())


def test_a_tensor_may_be_sharded_in_all_three_dimensions(tmp_path: Path) -> None:
    cube = torch.arange(3 * 4 * 5.0).reshape(3, 4, 5)
    boxes: list[Box] = [
        ([i, j, k], [size_i, size_j, size_k])
        for i, size_i in ((0, 1), (1, 2))
        for j, size_j in ((0, 3), (3, 1))
        for k, size_k in ((0, 2), (2, 3))
    ]
    save(tmp_path, {"w": (cube, boxes)})
    target = torch.zeros(3, 4, 5)
    with ShardReader(tmp_path) as reader:
        reader.read([("w", target)])
    assert torch.equal(target, cube)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2)], ids=str)
def test_a_tensor_without_elements_needs_no_shard(tmp_path: Path, shape: tuple[int, ...]) -> None:
    save(tmp_path, {"w": (torch.empty(shape), []), "v": (table(), LAYOUTS["rows"])})
    target = torch.zeros(5, 6)
    with ShardReader(tmp_path) as reader:
        reader.read([("w", torch.empty(shape)), ("v", target)])
    assert torch.equal(target, table())


def test_a_scalar_is_read(tmp_path: Path) -> None:
    save(tmp_path, {"step": (torch.tensor(7.5), [([], [])])})
    target = torch.tensor(0.0)
    with ShardReader(tmp_path) as reader:
        reader.read([("step", target)])
    assert target == 7.5


def test_a_parameter_is_filled_in_place_and_still_requires_grad(tmp_path: Path) -> None:
    save(tmp_path, {"w": (table(), LAYOUTS["boxes"])})
    parameter = torch.nn.Parameter(torch.zeros(5, 6))
    where = parameter.data_ptr()
    with ShardReader(tmp_path) as reader:
        reader.read([("w", parameter)])
    assert torch.equal(parameter, table())
    assert (parameter.data_ptr(), parameter.requires_grad, parameter.grad_fn) == (where, True, None)


def test_one_tensor_may_fill_several_targets(tmp_path: Path) -> None:
    save(tmp_path, {"w": (table(), LAYOUTS["rows"])})
    targets = [torch.zeros(5, 6), torch.zeros(6, 5).t()]
    with ShardReader(tmp_path) as reader:
        reader.read([("w", target) for target in targets])
    assert all(torch.equal(target, table()) for target in targets)


def test_a_target_of_another_shape_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, {"w": (table(), LAYOUTS["rows"])})
    with ShardReader(tmp_path) as reader, pytest.raises(CheckpointRejected, match="another shape"):
        reader.read([("w", torch.zeros(4, 6))])


def test_tensors_that_share_their_cut_are_told_apart(tmp_path: Path) -> None:
    saved = {name: (table() + n, LAYOUTS["boxes"]) for n, name in enumerate("uvw")}
    save(tmp_path, saved, shared=True)
    targets = {name: torch.zeros(5, 6) for name in saved}
    with ShardReader(tmp_path) as reader:
        assert len(reader.index.cuts) == len(reader.index.ranks) == 1
        reader.read(list(targets.items()))
        ranges = reader.ranges(list(targets.items()))
    for name, (tensor, _) in saved.items():
        assert torch.equal(targets[name], tensor)
    assert {name: len(found) for name, found in ranges.items()} == {FILES[0]: 6, FILES[1]: 6}


def test_a_file_truncated_meanwhile_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, {"w": (table(), LAYOUTS["rows"])})
    wanted = [("w", torch.zeros(5, 6))]
    with ShardReader(tmp_path) as reader:
        reader.check(wanted)
        with (tmp_path / FILES[1]).open("r+b") as file:
            file.truncate(file.seek(0, 2) - 4)
        with pytest.raises(CheckpointRejected, match="ends before its tensors"):
            reader.read(wanted)


def test_a_missing_file_is_found_before_anything_is_filled(tmp_path: Path) -> None:
    save(tmp_path, {"w": (table(), LAYOUTS["rows"])})
    (tmp_path / FILES[1]).unlink()
    target = torch.zeros(5, 6)
    with ShardReader(tmp_path) as reader, pytest.raises(FileNotFoundError):
        reader.check([("w", target)])
    assert not target.any()
    assert not [
        link for link in Path("/proc/self/fd").iterdir() if link.resolve().is_relative_to(tmp_path)
    ]


# -- shards of this rank --------------------------------------------------------------------------


@pytest.fixture
def world_of_four() -> Iterator[None]:
    """Rank 1 of 4, without the other ranks: no read is collective."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("world_of_four")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("placements", "rows", "columns"),
    [
        ([Shard(0)], slice(2, 4), slice(0, 6)),  # 5 rows over 4 ranks: 2, 2, 1, 0
        ([Shard(1)], slice(0, 5), slice(2, 4)),
        ([Replicate()], slice(0, 5), slice(0, 6)),
    ],
    ids=["rows", "columns", "all"],
)
def test_only_this_ranks_shard_of_a_dtensor_is_read(
    tmp_path: Path, layout: str, placements: list[Any], rows: slice, columns: slice, shared: bool
) -> None:
    save(tmp_path, {"w": (table(), LAYOUTS[layout])}, shared=shared)
    expected = table()[rows, columns]
    mesh = init_device_mesh("cpu", (4,))
    target = DTensor.from_local(
        torch.zeros(expected.shape), mesh, placements, run_check=False,
        shape=torch.Size((5, 6)), stride=(6, 1),
    )  # fmt: skip
    with ShardReader(tmp_path) as reader:
        reader.read([("w", target)])
    assert torch.equal(target.to_local(), expected)

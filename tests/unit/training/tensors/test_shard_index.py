"""An index is believed if its shards cover each tensor once and lie in files that hold them."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.tensors import shard_index
from elastic_ckpt.training.tensors.shard_index import MAX_SHARDS, read_index, shard_file
from elastic_ckpt.training.tensors.shard_reader import ShardReader
from tests.unit.training.tensors.write_tensors import write_tensors

FILE = "00000.safetensors"


def shard(
    offsets: list[Any], sizes: list[Any], name: str = "w", file: str = FILE
) -> dict[str, Any]:
    return {"file": file, "name": name, "offsets": offsets, "sizes": sizes}


def tensor(shape: list[Any], *shards: dict[str, Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "shards": list(shards)}


def written(directory: Path, index: Any) -> Path:
    text = index if isinstance(index, str | bytes) else json.dumps({"tensors": index})
    (directory / "index.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


HALVES = (shard([0, 0], [1, 3]), shard([1, 0], [1, 3]))


@pytest.mark.parametrize(
    "entry",
    [
        tensor([2, 3], shard([0, 0], [2, 3])),
        tensor([2, 3], *HALVES),
        tensor([2, 3], *reversed(HALVES)),
        tensor([2, 3], shard([0, 0], [2, 1]), shard([0, 1], [2, 2])),
        tensor([2, 2], *(shard([i, j], [1, 1]) for i in range(2) for j in range(2))),
        tensor([], shard([], [])),
        tensor([0, 3]),
        tensor([0]),
        tensor([2, 3], *HALVES, shard([1, 0], [0, 3])),
    ],
    ids=[
        "whole",
        "rows",
        "any order",
        "columns",
        "boxes",
        "scalar",
        "empty",
        "empty 1d",
        "nothing",
    ],
)
def test_an_index_that_covers_each_tensor_once_is_read(
    tmp_path: Path, entry: dict[str, Any]
) -> None:
    (found,) = read_index(written(tmp_path, {"w": entry})).tensors.values()
    assert found.shape == entry["shape"]
    assert [vars_of(one) for one in found.shards] == entry["shards"]


def vars_of(one: Any) -> dict[str, Any]:
    return {key: getattr(one, key) for key in ("file", "name", "offsets", "sizes")}


WHOLE = shard([0, 0], [2, 3])
HUGE = 2**70

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "a hole": (tensor([2, 3], shard([0, 0], [1, 3])), "cover it exactly once"),
    "no shards": (tensor([2, 3]), "cover it exactly once"),
    "a scalar without a shard": (tensor([]), "cover it exactly once"),
    "the same shard twice": (tensor([2, 3], WHOLE, WHOLE), "cover it exactly once"),
    "an overlap beside a hole": (
        tensor([4], shard([0], [2]), shard([1], [2])), "overlap",
    ),
    "a scalar twice": (tensor([], shard([], []), shard([], [])), "cover it exactly once"),
    "an overlap in columns": (
        tensor([2, 4], shard([0, 0], [2, 2]), shard([0, 1], [2, 2])), "overlap",
    ),
    "out of range": (tensor([2, 3], shard([1, 0], [2, 3])), "outside"),
    "a negative offset": (tensor([2, 3], shard([-1, 0], [2, 3])), "outside"),
    "negative sizes": (tensor([2, 3], shard([0, 0], [-2, -3])), "outside"),
    "a negative shape": (tensor([-2, -3], shard([0, 0], [2, 3])), "shape"),
    "too few dimensions": (tensor([2, 3], shard([0], [6])), "dimensions"),
    "too many dimensions": (tensor([2, 3], shard([0, 0, 0], [2, 3, 1])), "dimensions"),
    "sizes of other dimensions": (tensor([2, 3], shard([0, 0], [6])), "dimensions"),
    "a shape of 65 dimensions": (tensor([1] * 65, shard([0] * 65, [1] * 65)), "shape"),
    "more elements than memory": (tensor([2**61], shard([0], [2**61])), "shape"),
    "numbers beyond 64 bits": (tensor([HUGE], shard([0], [HUGE])), "shape"),
    "offsets beyond 64 bits": (tensor([2, 3], shard([HUGE, 0], [2, 3])), "outside"),
    "beyond 64 bits, of nothing": (
        tensor([HUGE, 0], shard([0, 0], [HUGE, 0]), shard([0, 0], [HUGE, 0])), "",
    ),
    "an unknown dtype": (tensor([2, 3], WHOLE, dtype="F7"), "dtype"),
    "a number for a dtype": (tensor([2, 3], WHOLE) | {"dtype": 7}, ""),
    "a fraction for a size": (tensor([2, 3], shard([0, 0], [2.5, 3])), ""),
    "text for a shape": (tensor([2, 3], WHOLE) | {"shape": "2,3"}, ""),
    "no list of shards": (tensor([2, 3]) | {"shards": None}, ""),
    "more shards than anybody writes": (
        tensor([0], *[shard([0], [0])] * (MAX_SHARDS + 1)), "shards",
    ),
    **{
        f"the file {name!r}": (tensor([2, 3], shard([0, 0], [2, 3], file=name)), "not in a file")
        for name in (
            "../00000.safetensors", "/etc/00000.safetensors", "..", "", "state.safetensors",
            "a/00000.safetensors", "00000.safetensors\n", "00000.safetensors/..",
            "\u0661\u0661\u0661\u0661\u0661.safetensors", "00000\x00.safetensors",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_an_invalid_index_is_rejected_with_the_tensors_name(tmp_path: Path, case: str) -> None:
    entry, reason = HOSTILE[case]
    with pytest.raises(CheckpointRejected, match=reason or None) as caught:
        read_index(written(tmp_path, {"fine": tensor([2, 3], WHOLE), "the bad": entry}))
    if reason:
        assert "the bad: " in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b'{"tensors": []}', b'{"tensors": {"w": 1}}', b"{}",
        b"\xff\xfe", b'{"tensors": {"w": ' + b"[" * 200_000 + b"]" * 200_000 + b"}}",
        b'{"tensors": {}, "more": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"tensors": {"w": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "shards": []}}}',
    ],
    ids=["nothing", "torn", "a list", "null", "tensors a list", "an entry a number", "no tensors",
         "no text", "deep", "deep in what is ignored", "a number of 5000 digits"],
)  # fmt: skip
def test_an_unreadable_index_is_rejected(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(CheckpointRejected, match=r"index\.json in"):
        read_index(written(tmp_path, text))


def test_a_key_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    entry = tensor([2, 3], WHOLE | {"later": 1}) | {"later": [1]}
    written(tmp_path, json.dumps({"tensors": {"w": entry}, "later": {}}))
    assert list(read_index(tmp_path).tensors) == ["w"]


def test_a_linked_index_is_rejected_and_a_missing_one_is_an_os_error(
    tmp_path: Path,
) -> None:
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path)
    written(tmp_path, {"w": tensor([2, 3], WHOLE)})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.json").symlink_to(tmp_path / "index.json")
    with pytest.raises(CheckpointRejected):
        read_index(tmp_path / "other")


# -- tensors that refer to how they are cut --------------------------------------------------------


def referring(**changes: Any) -> dict[str, Any]:
    """Return an index of one tensor, whose halves two ranks wrote."""
    cut = {"offsets": [[0, 0], [1, 0]], "sizes": [[1, 3], [1, 3]]}
    entry = {"dtype": "F32", "shape": [2, 3], "cut": 0, "ranks": 0} | changes.pop("entry", {})
    return {"tensors": {"w": entry}, "cuts": [cut], "ranks": [[4, 7]]} | changes


def test_a_tensor_may_refer_to_how_it_is_cut(tmp_path: Path) -> None:
    index = read_index(written(tmp_path, json.dumps(referring())))
    shards = [vars_of(index.shard("w", number)) for number in range(2)]
    assert shards == [
        shard([0, 0], [1, 3], "w@0,0", "00004.safetensors"),
        shard([1, 0], [1, 3], "w@1,0", "00007.safetensors"),
    ]
    assert index.files() == ["00004.safetensors", "00007.safetensors"]


HOSTILE_REFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "a cut that is not there": (referring(entry={"cut": 1}), "how it is cut"),
    "a cut before the first": (referring(entry={"cut": -1}), "how it is cut"),
    "ranks that are not there": (referring(entry={"ranks": 1}), "which ranks"),
    "ranks before the first": (referring(entry={"ranks": -1}), "which ranks"),
    "no ranks": (referring(entry={"ranks": None}), "which ranks"),
    "ranks, and no cut": (referring(entry={"cut": None}), "cover it exactly once"),
    "too few ranks": (referring(ranks=[[4]]), "not of one number"),
    "too many ranks": (referring(ranks=[[4, 7, 8]]), "not of one number"),
    "a negative rank": (referring(ranks=[[4, -7]]), "not in a file"),
    "a rank of eleven digits": (referring(ranks=[[4, 10**10]]), "not in a file"),
    "a rank beyond 64 bits": (referring(ranks=[[4, 2**70]]), ""),
    "a path for a rank": (referring(ranks=[[4, "../7"]]), ""),
    "sizes of fewer boxes": (
        referring(cuts=[{"offsets": [[0, 0], [1, 0]], "sizes": [[2, 3]]}]), "not of one number",
    ),
    "a hole": (referring(entry={"shape": [3, 3]}), "cover it exactly once"),
    "a shape with fewer rows": (referring(entry={"shape": [1, 3]}), "outside"),
    "a shape with other dimensions": (referring(entry={"shape": [6]}), "dimensions"),
    "an overlap beside a hole": (
        referring(cuts=[{"offsets": [[0, 0], [0, 1]], "sizes": [[2, 2], [1, 2]]}]), "overlap",
    ),
    "more shards than anybody writes": (
        referring(
            cuts=[{"offsets": [[0, 0]] * (MAX_SHARDS + 1), "sizes": [[0, 0]] * (MAX_SHARDS + 1)}],
            ranks=[[0] * (MAX_SHARDS + 1)],
        ),
        "shards",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_REFERENCES)
def test_an_invalid_reference_is_rejected(tmp_path: Path, case: str) -> None:
    index, reason = HOSTILE_REFERENCES[case]
    with pytest.raises(CheckpointRejected, match=reason or None):
        read_index(written(tmp_path, json.dumps(index)))


@pytest.mark.parametrize("seed", range(40))
def test_boxes_that_overlap_are_found_however_they_lie(seed: int) -> None:
    """Small random boxes, some of them cells of a grid, against a count of each element."""
    draw = random.Random(seed)
    cuts = [sorted({0, 6, *draw.choices(range(1, 6), k=2)}) for _ in range(2)]
    cells = [
        ([a, b], [c - a, d - b])
        for a, c in itertools.pairwise(cuts[0])
        for b, d in itertools.pairwise(cuts[1])
    ]
    boxes = draw.sample(cells, draw.randint(2, len(cells))) if len(cells) > 2 else cells
    for _ in range(draw.choice((0, 0, 1, 2))):
        low = [draw.randrange(6), draw.randrange(6)]
        boxes.append((low, [draw.randint(0, 6 - low[0]), draw.randint(0, 6 - low[1])]))
    seen = torch.zeros(6, 6)
    for (a, b), (c, d) in boxes:
        seen[a : a + c, b : b + d] += 1
    offsets, sizes = [list(one) for one in zip(*boxes, strict=True)]
    assert shard_index.overlap(offsets, sizes) is bool((seen > 1).any())


# -- the files ------------------------------------------------------------------------------------


class _Plain:
    """A sink of nothing but bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(b"")

    def write(self, data: Any) -> int:
        with self.path.open("ab") as file:
            return file.write(data)


def checked(directory: Path, *wanted: tuple[str, torch.Tensor]) -> None:
    with ShardReader(directory) as reader:
        reader.check(wanted or [("w", torch.zeros(2, 3))])


def test_only_files_that_are_read_are_opened(tmp_path: Path) -> None:
    write_tensors(_Plain(tmp_path / FILE), {"a": torch.ones(2, 3), "b": torch.ones(1)})
    index = {
        "a": tensor([2, 3], shard([0, 0], [2, 3], "a")),
        "b": tensor([1], shard([0], [1], "b")),
        "elsewhere": tensor([1], shard([0], [1], "c", shard_file(1))),
    }
    written(tmp_path, index)
    checked(tmp_path, ("a", torch.zeros(2, 3)), ("b", torch.zeros(1)))
    with pytest.raises(FileNotFoundError, match="00001"):
        checked(tmp_path, ("elsewhere", torch.zeros(1)))


@pytest.mark.parametrize(
    "held",
    [torch.ones(3, 2), torch.ones(6), torch.ones(2, 3, dtype=torch.int32), torch.ones(2, 4)],
    ids=["transposed", "flat", "another dtype", "larger"],
)
def test_a_shard_that_differs_from_the_index_is_rejected(
    tmp_path: Path, held: torch.Tensor
) -> None:
    write_tensors(_Plain(tmp_path / FILE), {"w": held})
    with pytest.raises(CheckpointRejected, match="w is not in 00000"):
        checked(written(tmp_path, {"w": tensor([2, 3], WHOLE)}))


def test_a_missing_shard_is_rejected(tmp_path: Path) -> None:
    write_tensors(_Plain(tmp_path / FILE), {"v": torch.ones(2, 3)})
    with pytest.raises(CheckpointRejected, match="w is not in 00000"):
        checked(written(tmp_path, {"w": tensor([2, 3], WHOLE)}))


@pytest.mark.parametrize("cut", [0, 7, 8, 40, -1])
def test_a_torn_file_is_rejected(tmp_path: Path, cut: int) -> None:
    write_tensors(_Plain(tmp_path / FILE), {"w": torch.ones(2, 3)})
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:cut])
    with pytest.raises(CheckpointRejected):
        checked(written(tmp_path, {"w": tensor([2, 3], WHOLE)}))


@pytest.mark.parametrize("rank", [0, 7, 99_999, 100_000])
def test_a_ranks_file_name_is_valid_in_an_index(tmp_path: Path, rank: int) -> None:
    entry = tensor([2, 3], shard([0, 0], [2, 3], file=shard_file(rank)))
    assert read_index(written(tmp_path, {"w": entry})).tensors["w"].shards[0].file == (
        f"{rank:05d}.safetensors"
    )

"""Our safetensors files are anybody's: the library reads them back, bit for bit."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import load_file, save

from elastic_ckpt.checkpoint.disk.hashed_file import BLOCK_BYTES, HashedFile
from elastic_ckpt.training.tensors.safetensors_file import DTYPES, METADATA_KEY
from tests.unit.training.tensors.write_tensors import write_tensors


def written(path: Path, tensors: dict[str, torch.Tensor]) -> bytes:
    file = HashedFile(path)
    try:
        write_tensors(file, tensors)
        written = file.finish()
    finally:
        file.close()
    data = path.read_bytes()
    assert written[:2] == (len(data), xxhash.xxh3_128_hexdigest(data))
    return data


def header(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern may come: nan with a payload, denormals, minus zero."""
    generator = torch.Generator().manual_seed(3)
    count = int(torch.Size(shape).numel()) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    if dtype is torch.bool:
        raw %= 2
    return raw.view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_dtype_is_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "many": random_bits(dtype, 3, 5),
        "one": random_bits(dtype, 1)[0],
        "none": torch.empty(0, 4, dtype=dtype),
    }
    data = written(tmp_path / "file", tensors)
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype and found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)
    assert header(data)["many"]["dtype"] == header(save({"many": tensors["many"]}))["many"]["dtype"]


def test_tensors_of_all_dtypes_share_one_file(tmp_path: Path) -> None:
    """Odd sizes, so that one that is not aligned would be noticed."""
    tensors = {f"{index}": random_bits(dtype, 7) for index, dtype in enumerate(DTYPES)}
    data = written(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }
    start = 8 + struct.unpack("<Q", data[:8])[0]
    assert start % 8 == 0
    for name, tensor in tensors.items():
        begin, end = header(data)[name]["data_offsets"]
        assert (start + begin) % tensor.element_size() == 0
        assert end - begin == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.zeros(0)},
        {"a": torch.tensor(3.5)},
        {"b": torch.ones(3), "a": torch.ones(2, dtype=torch.int8), "c": torch.zeros(0, 2)},
        {'ä.\u4e2d\U0001f600 " \\ \n': torch.ones(1), "": torch.ones(1)},
    ],
    ids=["nothing", "empty", "scalar", "several", "odd names"],
)
def test_the_header_equals_the_librarys(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Same names, dtypes, shapes and sizes, and no byte of the data is left uncovered."""
    ours = written(tmp_path / "file", tensors)
    theirs = save(tensors, metadata={"format": "pt"})

    def meaning(data: bytes) -> dict[str, Any]:
        return {
            name: value if name == METADATA_KEY else (
                value["dtype"], value["shape"], value["data_offsets"][1] - value["data_offsets"][0]
            )
            for name, value in header(data).items()
        }  # fmt: skip

    assert meaning(ours) == meaning(theirs)
    offsets = sorted(
        value["data_offsets"] for name, value in header(ours).items() if name != METADATA_KEY
    )
    end = 0
    for begin, after in offsets:
        assert begin == end
        end = after
    assert len(ours) == 8 + struct.unpack("<Q", ours[:8])[0] + end
    assert set(load_file(tmp_path / "file")) == set(tensors)


def test_a_tensor_larger_than_a_chunk_is_written_whole(tmp_path: Path) -> None:
    tensor = random_bits(torch.int16, BLOCK_BYTES + 3)
    written(tmp_path / "file", {"large": tensor})
    assert torch.equal(load_file(tmp_path / "file")["large"], tensor)


def test_a_tensor_is_written_in_logical_order(tmp_path: Path) -> None:
    """Transposed, with gaps, expanded: only the logical order matters."""
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.t(),
        "gaps": base[::2, 1::3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "behind": base[2:],
    }
    written(tmp_path / "file", tensors)
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())

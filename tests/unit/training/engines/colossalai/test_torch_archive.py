"""An archive that is laid out beforehand holds what ``torch.save`` writes."""

import contextlib
import gc
import io
import weakref
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from elastic_ckpt.training.engines.colossalai import torch_archive
from elastic_ckpt.training.engines.colossalai.torch_archive import plan_archive

BASE = torch.arange(1000.0)
TIED = torch.randn(50, 2)


class Odd(torch.Tensor):
    """A subclass that no library defines."""


STATES: dict[str, Any] = {
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.5),
    "not contiguous": torch.randn(4, 5).t(),
    "every width": [
        torch.ones(7, dtype=kind)
        for kind in (torch.bool, torch.int8, torch.bfloat16, torch.float64, torch.complex64)
    ],
    "views of a larger storage": {"left": BASE[10:20], "right": BASE[15:30]},
    "tied": {"a": TIED, "b": TIED, "c": nn.Parameter(TIED)},
    # In torch 2.5 storages lie in the order of their names as text: 0, 1, 10, 11, 2, ...
    "more than ten storages": [torch.full((100 + i,), float(i)) for i in range(23)],
    "storages alone": {
        "first": torch.arange(25.0).untyped_storage(),
        "tensor": torch.ones(25),
        "again": torch.arange(25.0),
    },
    "subclass": {"odd": torch.ones(3).as_subclass(Odd)},
    "sparse": torch.eye(3).to_sparse(),
    "no tensor": {"lr": 0.1, "names": ["a", ("b", None)]},
    "requires grad": nn.Parameter(torch.randn(3)),
}


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def laid_out(state: Any) -> bytes:
    archive = plan_archive(state)
    assert archive is not None
    buffer = io.BytesIO()
    archive.write(buffer)
    data = buffer.getvalue()
    assert len(data) == archive.size
    return data


def records(data: bytes) -> list[tuple[str, int, bytes]]:
    """Name, offset and bytes of each record, in order, past the sums that may differ."""
    found = []
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        start = data.index(info.filename.encode(), info.header_offset) + len(info.filename)
        start += int.from_bytes(data[info.header_offset + 28 : info.header_offset + 30], "little")
        content = data[start : start + info.file_size]
        same = b"" if info.filename.endswith("serialization_id") else content
        found.append((info.filename, start, same))
    return found


@pytest.mark.parametrize("name", STATES)
def test_records_equal_those_of_torch_save(name: str) -> None:
    assert records(laid_out(STATES[name])) == records(saved(STATES[name]))


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_loads_the_archive(tmp_path: Path, mapped: bool) -> None:
    wanted = ("empty", "scalar", "not contiguous", "every width", "views of a larger storage")
    state = {name: STATES[name] for name in (*wanted, "tied", "more than ten storages")}
    path = tmp_path / "model.bin"
    path.write_bytes(laid_out(state))
    found = torch.load(path, weights_only=True, mmap=mapped)
    left, right = (torch.utils._pytree.tree_leaves(tree) for tree in (found, state))
    assert len(left) == len(right) > 30
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))
    views = found["views of a larger storage"]
    assert views["left"].untyped_storage()._cdata == views["right"].untyped_storage()._cdata
    assert found["not contiguous"].stride() == (1, 5)


def test_a_storage_is_counted_and_written_once() -> None:
    archive = plan_archive(STATES["tied"])
    assert archive is not None
    assert archive.tensor_bytes == TIED.nbytes


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_torch_cannot_lay_out_is_left_to_torch() -> None:
    quantised = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.quint8)
    assert plan_archive({"q": quantised}) is None


def test_a_torch_that_does_not_skip_data_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the prototype to change, the files must stay right, if slow."""
    monkeypatch.setattr(torch_archive, "skip_data", contextlib.nullcontext)
    assert plan_archive({"a": torch.ones(100)}) is None


def test_two_dtypes_over_one_storage_are_rejected_as_by_torch() -> None:
    mixed = [BASE, BASE.view(torch.int32)]
    with pytest.raises(RuntimeError, match="different types"):
        torch.save(mixed, io.BytesIO())
    assert plan_archive(mixed) is None


def test_an_unpicklable_object_raises() -> None:
    with pytest.raises(Exception, match=r"pickle"):
        plan_archive({"f": lambda: None})


@pytest.mark.parametrize("known", [True, False])
def test_no_tensor_is_kept_alive_by_a_reference_cycle(
    monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    if not known:
        monkeypatch.setattr(torch_archive, "skip_data", contextlib.nullcontext)
    array = numpy.ones(10)
    gone = weakref.ref(array)
    gc.disable()
    try:
        plan_archive({"t": torch.from_numpy(array)})
        del array
        assert gone() is None
    finally:
        gc.enable()


def test_only_the_checksums_of_storages_are_missing() -> None:
    found = zipfile.ZipFile(io.BytesIO(laid_out({"a": torch.ones(100), "b": 1})))
    with pytest.raises(zipfile.BadZipFile, match="CRC"):
        found.read("archive/data/0")
    assert found.read("archive/data.pkl")
    assert found.read("archive/version")

"""Which bytes of a checkpoint the torch engine names on real ranks, and that no others are read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from torch import distributed

from elastic_ckpt.checkpoint.tier import Ranges
from elastic_ckpt.training.tensors.safetensors_file import first_tensor_at
from tests.integration.ranks import run_ranks
from tests.integration.torch_trainers import Trainer, differences, save


def overwrite_the_rest(directory: Path, ranges: Ranges) -> None:
    """Put other bytes in place of what is not in the ranges, headers excepted."""
    for path, parts in ranges.items():
        file = directory / path
        data = file.read_bytes()
        changed = bytearray(b"\xff" * len(data))
        for begin, end in [(0, first_tensor_at(file)), *parts]:
            changed[begin:end] = data[begin:end]
        file.write_bytes(changed)


def save_and_load_ranges(
    rank: int, directory: str, saved: str, kind: str
) -> tuple[float, list[str]]:
    """The share of the tensors' bytes that this rank names, and what differs after its load."""
    place, own = Path(directory, "saved"), Path(directory, f"own-{rank}")
    save(Trainer(saved).train(0, 3), place, rank)
    distributed.barrier()
    shutil.copytree(place, own)
    trainer = Trainer(kind, seed=9)
    ranges = trainer.engine.ranges(own)
    assert ranges is not None
    files = [own / path for path in ranges]
    named = sum(end - begin for parts in ranges.values() for begin, end in parts)
    total = sum(file.stat().st_size - first_tensor_at(file) for file in files)
    assert sorted(files) == sorted(own.glob("*/0*.safetensors"))
    overwrite_the_rest(own, ranges)
    distributed.barrier()
    trainer.engine.load(own)
    return named / total, differences(trainer, place)


@pytest.mark.parametrize(
    ("saved", "kind", "least", "most"),
    [("fsdp", "fsdp", 0.4, 0.6), ("ddp", "fsdp", 0.4, 0.6), ("fsdp", "ddp", 1.0, 1.0)],
)
def test_a_rank_names_the_bytes_of_its_shards(
    tmp_path: Path, saved: str, kind: str, least: float, most: float
) -> None:
    found = run_ranks(save_and_load_ranges, 2, str(tmp_path), saved, kind)
    assert [one[1] for one in found] == [[], []]
    shares = [one[0] for one in found]
    assert all(least <= share <= most for share in shares) and sum(shares) >= 1


def name_ranges_behind_a_long_header(rank: int, directory: str) -> bool:
    place = Path(directory, "saved")
    trainer = Trainer("plain").train(0, 1)
    save(trainer, place, rank)
    file = next(place.glob("modeling/*.safetensors"))
    file.write_bytes((2**24).to_bytes(8, "little") + file.read_bytes()[8:])
    return trainer.engine.ranges(place) is None


def test_files_whose_header_is_not_there_in_full_are_brought_whole(tmp_path: Path) -> None:
    assert run_ranks(name_ranges_behind_a_long_header, 1, str(tmp_path)) == [True]

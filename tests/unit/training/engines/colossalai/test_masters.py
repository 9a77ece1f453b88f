"""The fp32 masters of mixed precision: cut anew for any number of ranks, nothing hostile read."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.engines.colossalai.masters import Piece, load_masters, save_masters

PLACE = "pp0of1-tp0of1"


def cut(whole: torch.Tensor, shard: int, shards: int) -> torch.Tensor:
    """As ZeRO does: padded, flat, in equal shards."""
    step = -(-whole.numel() // shards)
    padded = torch.zeros(step * shards)
    padded[: whole.numel()] = whole
    return padded[shard * step : (shard + 1) * step].clone()


def piece(
    values: dict[str, torch.Tensor],
    shard: int,
    shards: int,
    place: str = PLACE,
    written: bool = True,
) -> Piece:
    sizes = {name: value.numel() for name, value in values.items()}
    masters = {name: cut(value, shard, shards) for name, value in values.items()}
    return Piece(place, shard, shards, masters, sizes, written)


def save(directory: Path, values: dict[str, torch.Tensor], shards: int) -> None:
    for shard in range(shards):
        save_masters(DiskPart(directory, "0" * 16, shard), [piece(values, shard, shards)])


def blank(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(value, 9.0) for name, value in values.items()}


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    before=st.integers(1, 6),
    after=st.integers(1, 6),
)
def test_any_number_of_shards_can_read_any_other(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], before: int, after: int
) -> None:
    directory = tmp_path_factory.mktemp("masters")
    values = {f"layer.{i}": torch.randn(size) for i, size in enumerate(sizes)}
    save(directory, values, before)
    for shard in range(after):
        mine = piece(blank(values), shard, after)
        assert load_masters(directory, [mine]) == ""
        for name, value in values.items():
            assert torch.equal(mine.masters[name], cut(value, shard, after))


def test_a_replica_writes_nothing(tmp_path: Path) -> None:
    part = DiskPart(tmp_path, "0" * 16, 1)
    save_masters(part, [piece({"w": torch.ones(3)}, 0, 1, written=False)])
    assert part.paths == []


def test_a_missing_parallel_index_is_reported(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(3)}, 2)
    other = piece({"w": torch.zeros(3), "v": torch.zeros(1)}, 0, 1, "pp0of1-tp0of2")
    assert (
        load_masters(tmp_path, [other]) == "none was saved for w and 1 more as this rank holds it"
    )
    assert torch.equal(other.masters["w"], torch.zeros(3))


def test_a_parameter_is_found_in_another_stage(tmp_path: Path) -> None:
    """What two stages held, one has now, and three more."""
    values = {"first": torch.randn(5), "last": torch.randn(7)}
    for stage, name in enumerate(values):
        one = piece({name: values[name]}, 0, 1, f"pp{stage}of2-tp0of1")
        save_masters(DiskPart(tmp_path, "0" * 16, stage), [one])
    whole = piece(blank(values), 0, 1, "pp0of1-tp0of1")
    assert load_masters(tmp_path, [whole]) == ""
    assert torch.equal(whole.masters["last"], values["last"])
    third = piece(blank({"last": values["last"]}), 1, 2, "pp2of3-tp0of1")
    assert load_masters(tmp_path, [third]) == ""
    assert torch.equal(third.masters["last"], cut(values["last"], 1, 2))


def lose(directory: Path) -> None:
    (directory / f"precision/masters-{PLACE}-00001-of-00002.safetensors").unlink()


def count_up(directory: Path) -> None:
    (directory / f"precision/masters-{PLACE}-00000-of-00002.safetensors").rename(
        directory / f"precision/masters-{PLACE}-00000-of-99999999.safetensors"
    )


def shorten(directory: Path) -> None:
    path = directory / f"precision/masters-{PLACE}-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize("spoil", [lose, count_up, shorten])
def test_an_invalid_shard_is_rejected(tmp_path: Path, spoil: object) -> None:
    save(tmp_path, {"w": torch.ones(8)}, 2)
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(CheckpointRejected):
        load_masters(tmp_path, [piece({"w": torch.zeros(8)}, 0, 1)])


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"w": torch.zeros(11)}, "has another size"),
        ({"w": torch.zeros(8, dtype=torch.float64)}, "has another dtype"),
    ],
)
def test_another_models_masters_are_rejected(
    tmp_path: Path, other: dict[str, torch.Tensor], why: str
) -> None:
    save(tmp_path, {"w": torch.ones(8)}, 2)
    mine = Piece(PLACE, 0, 1, other, {name: t.numel() for name, t in other.items()}, True)
    with pytest.raises(CheckpointRejected, match=why):
        load_masters(tmp_path, [mine])

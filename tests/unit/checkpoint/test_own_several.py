"""Several of the script's own checkpoints at once: their order, and files that are overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.seal import seals
from tests.unit.checkpoint.test_own_keeper import Place, names, never


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def _both(place: Place) -> OwnKeeper:
    return place.keeper("last.pt", "best.pt", complete_when="quiet:2s")


def _write(place: Place, name: str, value: float, at: float) -> Path:
    path = place.base / name
    torch.save(torch.full((64,), value), path)
    os.utime(path, ns=(int(at * 1e9), int(at * 1e9)))
    return path


def _value(path: Path) -> float:
    return float(torch.load(path, weights_only=True)[0])


def _best_once_then_last_four_times(place: Place) -> None:
    keeper = _both(place)
    _write(place, "best.pt", 1.0, at=1)
    for at in range(4):
        _write(place, "last.pt", float(at), at=2 + at)
        keeper.look(at * 10.0)
        keeper.look(at * 10.0 + 3)


def test_a_best_one_is_not_the_newest_after_a_restart(place: Place) -> None:
    _best_once_then_last_four_times(place)
    assert sorted(names(place)) == ["best.pt", "last.pt", "last.pt"]
    assert _both(place).prepare(never) == str(place.base / "last.pt")


def test_each_file_that_is_overwritten_keeps_copies_of_its_own(place: Place) -> None:
    _best_once_then_last_four_times(place)
    torn = place.base / "best.pt"
    torn.write_bytes(torn.read_bytes()[:100])  # killed while the next best one was copied
    assert _both(place).prepare(never) == str(place.base / "last.pt")
    assert _value(torn) == 1.0
    assert _value(place.base / "last.pt") == 3.0
    assert [name for name, _ in place.aside] == ["best.pt"]


def test_a_file_beside_the_newest_is_put_back_too(place: Place) -> None:
    keeper = place.keeper("model.pt", "optimizer.pt", complete_when="quiet:2s")
    model = _write(place, "model.pt", 1.0, at=1)
    _write(place, "optimizer.pt", 1.0, at=2)
    keeper.look(0.0)
    keeper.look(3.0)
    model.write_bytes(model.read_bytes()[:100])  # the first of the two, in the middle of a save
    again = place.keeper("model.pt", "optimizer.pt", complete_when="quiet:2s")
    assert again.prepare(never) == str(place.base / "optimizer.pt")
    assert _value(model) == 1.0
    again = place.keeper("model.pt", "optimizer.pt", complete_when="quiet:2s")
    model.unlink()  # a start that was interrupted after the torn one was set aside
    again.prepare(never)
    assert _value(model) == 1.0


@pytest.mark.parametrize("restart", [True, False])
def test_the_order_of_the_names_does_not_make_the_newest(place: Place, restart: bool) -> None:
    for number, step in enumerate([50, 75, 100], start=1):  # 100 sorts before 50
        path = place.save(step)
        for file in path.iterdir():
            os.utime(file, ns=(number * 10**9, number * 10**9))
    keeper = place.keeper()
    if restart:
        assert keeper.prepare(never).endswith("checkpoint-100")
    else:
        keeper.look(0.0)
        keeper.look(2.0)
        assert keeper.newest is not None
        assert keeper.newest.step == 100
    assert [one.step for one in seals(place.job)] == [100, 75, 50]


def test_a_fall_back_puts_the_copy_before_the_newest_in_its_place(place: Place) -> None:
    keeper = place.keeper("last.pt", complete_when="quiet:2s")
    keeper.prepare(never)
    for at in range(3):
        path = _write(place, "last.pt", float(at), at=2 + at)
        keeper.look(at * 10.0)
        keeper.look(at * 10.0 + 3)
    assert keeper.fall_back("step failed twice") is not None
    assert keeper.prepare(never) == str(path)
    assert _value(path) == 1.0
    assert [name for name, _ in place.aside] == ["last.pt"]

"""Without an interval of anyone's, the supervisor asks for saves as with ``auto``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from elastic_ckpt.policy.interval import FIRST_SAVE_SECONDS, SaveInterval
from elastic_ckpt.policy.prediction import Predictor
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.supervisor.ports import Clock
from elastic_ckpt.supervisor.saves.adviser import SaveAdviser
from elastic_ckpt.supervisor.settings import RunSettings


def adviser(interval: SaveInterval) -> SaveAdviser:
    directory: Any = mock.Mock()
    directory.history.return_value = directory.events.return_value = []
    directory.read_predictor.return_value = Predictor()
    settings = RunSettings(Path("/x"), Path("/x.py"), (), "job", "node", interval=interval)
    return SaveAdviser(settings, Clock(), directory, mock.Mock())


@pytest.fixture
def board() -> Iterator[Board]:
    yield Board.private()


@pytest.mark.parametrize(
    ("interval", "wanted", "asked"),
    [
        (SaveInterval(), True, True),
        (SaveInterval(), False, False),  # the script has its own interval, or none on purpose
        (SaveInterval(steps=10), True, False),
        (SaveInterval(auto=True), False, True),
    ],
)
def test_saves_are_asked_for_if_nobody_chose_when(
    board: Board, interval: SaveInterval, wanted: bool, asked: bool
) -> None:
    board.rank_slot(0).session("", wants_saves=wanted)
    saves = adviser(interval)
    saves.begin(0.0)
    slots: list[Slot] = board.read_slots()
    assert not saves.due(FIRST_SAVE_SECONDS - 1, lambda: slots)
    assert saves.due(FIRST_SAVE_SECONDS + 1, lambda: slots) is asked
    assert (saves.optimal_interval is not None) is asked

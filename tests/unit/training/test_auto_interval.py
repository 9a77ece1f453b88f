"""Automatic saves without a supervisor: by the leader's clock, at steps that all ranks know."""

from __future__ import annotations

import pytest

from elastic_ckpt.policy.interval import DEFAULT_MTBF_SECONDS, FIRST_SAVE_SECONDS, daly_interval
from elastic_ckpt.training.auto_interval import AutoInterval
from elastic_ckpt.training.ranks.peers import Peers


class CountingPeers(Peers):
    """One rank that counts how often it asks the leader."""

    def __init__(self) -> None:
        super().__init__(0, 1, None, 1.0)
        self.asked = 0

    def tell(self, name: str, value: bytes) -> bytes:
        self.asked += 1
        return super().tell(name, value)


@pytest.mark.parametrize("step_seconds", [0.001, 0.5, 90.0])
def test_first_save_after_a_minute_then_as_often_as_pays(step_seconds: float) -> None:
    now, cost = 1000.0, 3.0
    peers = CountingPeers()
    interval = AutoInterval(peers, lambda: now)
    saves = []
    step = 0
    while len(saves) < 4:
        step += 1
        now += step_seconds
        if interval.due(step):
            saves.append(now)
            now += cost
    assert saves[0] - 1000.0 == pytest.approx(FIRST_SAVE_SECONDS, abs=max(2.1 * step_seconds, 2.0))
    between = daly_interval(cost, DEFAULT_MTBF_SECONDS)
    assert saves[-1] - saves[-2] == pytest.approx(between, abs=max(2.1 * step_seconds, 20.0))
    assert peers.asked < 40 * len(saves)  # a step without a question is the rule

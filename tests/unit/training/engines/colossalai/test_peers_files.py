"""Which of ColossalAI's plugins have a rank read what other ranks wrote."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from colossalai.booster.plugin.gemini_plugin import GeminiCheckpointIO
from colossalai.booster.plugin.low_level_zero_plugin import LowLevelZeroCheckpointIO
from colossalai.booster.plugin.torch_ddp_plugin import TorchDDPCheckpointIO
from colossalai.booster.plugin.torch_fsdp_plugin import TorchFSDPCheckpointIO
from colossalai.checkpoint_io import (
    GeneralCheckpointIO,
    HybridParallelCheckpointIO,
    MoECheckpointIO,
)

from elastic_ckpt.training.engines.colossalai.engine import ColossalAIEngine


class Own(HybridParallelCheckpointIO):
    """Some other package's."""


@pytest.mark.parametrize(
    ("kind", "stages", "expected"),
    [
        (TorchDDPCheckpointIO, 1, False),
        (LowLevelZeroCheckpointIO, 1, False),
        (TorchFSDPCheckpointIO, 1, False),
        (GeminiCheckpointIO, 1, False),
        (HybridParallelCheckpointIO, 1, False),
        (HybridParallelCheckpointIO, 2, True),
        (MoECheckpointIO, 1, True),
        (GeneralCheckpointIO, 1, True),
        (Own, 1, True),
    ],
)
def test_rank_0_merges_the_indexes_of_stages_and_experts(
    kind: Any, stages: int, expected: bool
) -> None:
    saver = kind.__new__(kind)
    saver.async_writers, saver.pp_size = [], stages
    engine = ColossalAIEngine.__new__(ColossalAIEngine)
    engine._booster = SimpleNamespace(checkpoint_io=saver)
    assert engine.reads_peers_files is expected

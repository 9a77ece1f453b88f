"""Every plugin of ColossalAI's on GPUs, without the shim: a resume is exact."""

import pytest
import torch

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from tests import plugins
from tests.gpu import devices
from tests.plugins import SETUPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(2 * devices.SECONDS + 60),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("setup", SETUPS, ids=[setup.name for setup in SETUPS])
def test_a_resume_is_exact(setup, tmp_path):
    fits = devices.fitting(setup, devices.gpus())
    if fits is None:
        pytest.skip(f"it needs {setup.ranks} GPUs, and there are {devices.gpus()}")
    if plugins.why_not_here(fits):
        pytest.skip(plugins.why_not_here(fits))
    devices.check_resume(fits, tmp_path)

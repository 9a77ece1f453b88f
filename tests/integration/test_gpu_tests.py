"""The code of the GPU tests, run over gloo on a machine without a GPU."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import plugins
from tests.gpu import devices
from tests.marks import slow
from tests.plugins import SETUPS, named

ROOT = Path(__file__).parents[2]

GLOO_AFRESH = "cpu:gloo"
"""Differs from the default of ``run_ranks``, so that ranks start as on GPUs."""

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
colossalai = pytest.mark.skipif(
    importlib.util.find_spec("colossalai") is None, reason="ColossalAI is not installed"
)


@colossalai
@pytest.mark.parametrize(
    ("name", "available", "backend"),
    [("LowLevelZero 1 bf16", 2, "gloo"), slow("Hybrid dp2 fp16 (llama)", 1, GLOO_AFRESH)],
)
def test_gpu_checks_are_exact_on_a_cpu(name, available, backend, tmp_path):
    setup = devices.fitting(named(name), available)
    assert setup is not None and setup.ranks == available
    devices.check_resume(setup, tmp_path, backend)


@pytest.mark.slow
@colossalai
def test_gpu_checks_notice_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "load_and_train", plugins.load_plainly_and_train)
    with pytest.raises(AssertionError, match="masters"):
        devices.check_resume(named("LowLevelZero 1 bf16"), tmp_path, "gloo")


@pytest.mark.slow
@without_a_gpu
def test_nccl_ranks_select_their_gpu_first(capfd):
    """Without a GPU each rank fails at that call."""
    setup = named("LowLevelZero 1 bf16")
    assert devices.failure(devices.run(plugins.train_and_save, setup, "nowhere")) == "exit code 1"
    message = capfd.readouterr().err
    assert message.count("torch.cuda.set_device(rank)") == 2
    assert "init_process_group" not in message


def test_setups_fit_the_available_gpus():
    assert all(devices.fitting(setup, 4) is setup for setup in SETUPS)
    assert not any(devices.fitting(setup, 0) for setup in SETUPS)
    on_one = {setup.name for setup in SETUPS if devices.fitting(setup, 1)}
    assert {"TorchDDP fp32", "LowLevelZero 2 bf16, offload", "Gemini bf16, in chunks"} <= on_one
    assert {"Hybrid dp2 zero2 bf16 (llama)", "TorchFSDP fp32"} <= on_one
    parallel = [setup for setup in SETUPS if setup.name not in on_one]
    assert parallel and all(
        any(word in setup.name for word in ("tp2", "pp2", "sp2", "ep2")) for setup in parallel
    )


@pytest.mark.one_torch
@pytest.mark.slow
@without_a_gpu
@colossalai
def test_gpu_tests_are_skipped_with_a_reason():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "-m", "gpu", "tests/gpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(line.endswith("there is no CUDA device") for line in skipped)
    assert any(
        line.startswith(f"SKIPPED [{len(SETUPS)}] tests/gpu/test_plugins") for line in skipped
    )

"""Saves written by TensorNVMe: sealed only when complete, and never unpickled."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from elastic_ckpt.checkpoint.verify import verify_full
from tests import plugins
from tests.integration.ranks import run_ranks
from tests.marks import slow
from tests.plugins import STEPS, named

STANDINS = str(Path(__file__).parents[1] / "standins")


def with_writer():
    """Install a stand-in for the writer, which TensorNVMe's release on PyPI lacks."""
    sys.path.insert(0, STANDINS)
    from colossalai.utils import safetensors
    from tensornvme.async_file_io import AsyncFileWriter

    safetensors.AsyncFileWriter = AsyncFileWriter
    import torch

    if not torch.cuda.is_available():  # pinned memory needs CUDA
        plain = torch.empty_like
        torch.empty_like = lambda *args, pin_memory=False, **options: plain(*args, **options)
    return AsyncFileWriter


def save_async(rank, setup, directory):
    from elastic_ckpt import save_checkpoint

    writer = with_writer()
    built = plugins.build(setup)
    plugins.train(built, 0, STEPS)
    with plugins.quiet():
        save_checkpoint(directory, *built.state, 0, STEPS, plugins.BATCH, None, use_async=True)
    unfinished = writer.unfinished
    plugins.train(built, STEPS, 2 * STEPS)
    return [unfinished, plugins.digests(built)]


def load(rank, setup, directory):
    return [0, plugins.load_and_train(rank, setup, directory)[1]]


@pytest.mark.parametrize(
    "name", ["TorchDDP fp32", slow("LowLevelZero 1 bf16"), slow("Hybrid pp2 bf16 (llama)")]
)
def test_seal_waits_for_async_writes(name, tmp_path):
    setup = named(name)
    saved = run_ranks(save_async, setup.ranks, setup, str(tmp_path))
    assert [unfinished for unfinished, _ in saved] == [0] * setup.ranks
    manifest = verify_full(tmp_path / f"epoch-0_step-{STEPS}")
    assert any(entry.path.endswith(".safetensors") for entry in manifest.files)
    assert run_ranks(load, setup.ranks, setup, str(tmp_path)) == saved


def save_without_waiting(rank, setup, directory):
    with_writer()
    built = plugins.build(setup)
    plugins.train(built, 0, STEPS)
    from colossalai.checkpoint_io import CheckpointIO

    CheckpointIO._sync_io = lambda self: None
    from elastic_ckpt import save_checkpoint

    try:
        save_checkpoint(directory, *built.state, 0, STEPS, plugins.BATCH, None, use_async=True)
    except Exception as error:
        return [type(error).__name__, str(error)]
    return None


@pytest.mark.slow
def test_seal_without_the_wait_fails(tmp_path):
    """Indexes are written at once, before the files that they name."""
    setup = named("LowLevelZero 1 bf16")
    for name, text in run_ranks(save_without_waiting, 2, setup, str(tmp_path)):
        assert name == "SaveFailed" and "ColossalAI left out" in text
    assert not list(tmp_path.glob("epoch-*"))


class Hostile:
    """Creates a directory when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def load_hostile(rank, setup, directory, mark):
    """Put a pickle into an optimizer's number, in a checkpoint that verifies."""
    import pickle

    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    from elastic_ckpt import load_checkpoint
    from tests.checkpoints import seal_again

    root = Path(directory) / f"epoch-0_step-{STEPS}"
    (path,) = (root / "optimizer").glob("*.safetensors")
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    key = next(key for key in tensors if key.endswith(".step"))
    tensors[key] = torch.frombuffer(bytearray(pickle.dumps(Hostile(mark))), dtype=torch.uint8)
    save_file(tensors, path, {**metadata, "non_tensor_keys": json.dumps([key])})
    seal_again(root)
    built = plugins.build(setup)
    try:
        load_checkpoint(root, *built.state)
    except Exception as error:
        return [type(error).__name__, str(error), Path(mark).exists()]
    return ["loaded", "", Path(mark).exists()]


def test_pickle_inside_a_tensor_is_not_executed(tmp_path):
    setup = named("TorchDDP fp32").at(1, {})
    run_ranks(save_async, 1, setup, str(tmp_path / "job"))
    mark = tmp_path / "executed"
    [(name, text, executed)] = run_ranks(load_hostile, 1, setup, str(tmp_path / "job"), str(mark))
    assert (name, executed) == ("CheckpointRejected", False), text
    assert "posix.mkdir" in text


def save_without_tensornvme(rank, setup, directory):
    import warnings

    from elastic_ckpt import save_checkpoint

    built = plugins.build(setup)
    with warnings.catch_warnings(record=True) as printed:
        warnings.simplefilter("always")
        save_checkpoint(directory, *built.state, 0, 0, plugins.BATCH, None, use_async=True)
    return [str(one.message) for one in printed if "use_async" in str(one.message)]


@pytest.mark.slow
def test_without_tensornvme_it_warns_and_saves_synchronously(tmp_path):
    setup = named("TorchDDP fp32").at(1, {})
    [(printed,)] = run_ranks(save_without_tensornvme, 1, setup, str(tmp_path))
    assert "TensorNVMe's async_file_io, which is not installed" in printed
    assert list(tmp_path.glob("epoch-0_step-0/optimizer/pytorch_optim*.bin"))

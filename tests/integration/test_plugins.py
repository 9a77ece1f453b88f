"""Every ColossalAI plugin: a resume is exact where ColossalAI's own is not."""

import json

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, SaveFailed
from tests import plugins
from tests.integration.ranks import run_ranks
from tests.marks import slow, slow_unless
from tests.plugins import SETUPS, STEPS, Setup, named

OFTEN = {
    "TorchDDP fp32",
    "TorchFSDP fp32",
    "LowLevelZero 2 bf16",
    "Gemini bf16, in chunks",
    "Hybrid dp2 fp16 (llama)",
    "Hybrid tp2 bf16 (llama)",
    "Hybrid pp2 bf16 (llama)",
}
"""One setup for each kind of state that the engine keeps."""

by_name = pytest.mark.parametrize(
    "setup", slow_unless(OFTEN, SETUPS, [setup.name for setup in SETUPS])
)


def run(function, setup: Setup, *args):
    results = run_ranks(function, setup.ranks, setup, *args, seconds=120)
    for result in results:
        failed = isinstance(result, int) or (result and isinstance(result[0], str))
        assert not failed, results
    return results


@by_name
def test_a_resume_is_exact(setup, tmp_path):
    if plugins.why_not_here(setup):
        pytest.skip(plugins.why_not_here(setup))
    directory = str(tmp_path / "job")
    undisturbed = run(plugins.train_and_save, setup, directory)
    verify_full(tmp_path / "job" / f"epoch-0_step-{STEPS}")
    assert run(plugins.load_and_train, setup, directory) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["LowLevelZero 1 bf16", "Hybrid dp2 fp16 (llama)", "Gemini bf16, in chunks"],
)
def test_plain_colossalai_resumes_with_other_masters(name, tmp_path):
    """The extra files are needed; when this fails, they no longer are."""
    setup = named(name)
    directory = str(tmp_path / "job")
    undisturbed = run(plugins.train_and_save, setup, directory)
    resumed = run(plugins.load_plainly_and_train, setup, directory)
    for mine, theirs in zip(undisturbed, resumed, strict=True):
        assert mine[0]["weights"] == theirs[0]["weights"]
        assert mine[0]["masters"] != theirs[0]["masters"]
        assert mine[1]["weights"] != theirs[1]["weights"]
        if "fp16" in name:
            assert mine[0]["loss scale"] != theirs[0]["loss scale"]


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        slow("TorchDDP fp32", 4),
        slow("TorchFSDP fp32", 1),
        slow("LowLevelZero 2 bf16", 1),
        ("LowLevelZero 2 bf16", 3),
        slow("LowLevelZero 2 bf16", 4),
        slow("Hybrid tp2 bf16 (llama)", 4),
    ],
)
def test_other_world_size_loads_the_same_bits(name, ranks, tmp_path):
    """Masters are split again; with 3 ranks no parameter divides evenly."""
    setup = named(name)
    assert differing(setup, setup.at(ranks, {}), tmp_path / "job") == []


@pytest.mark.slow
def test_other_tensor_parallel_size_rebuilds_masters_with_a_warning(tmp_path, capfd):
    setup = named("Hybrid tp2 bf16 (llama)")
    other = setup.at(1, {"tp_size": 1})
    assert differing(setup, other, tmp_path / "job") == ["masters"]
    message = [
        line for line in capfd.readouterr().err.splitlines() if "not restored bit for bit" in line
    ]
    assert len(message) == 1
    assert "step-2 is not restored bit for bit: the fp32 master weights were made" in message[0]


@pytest.mark.slow
def test_other_pipeline_size_loads_the_same_bits(tmp_path):
    setup = named("Hybrid pp2 bf16 (llama)")
    assert differing(setup, setup.at(1, {"pp_size": 1}), tmp_path / "job") == []


def differing(setup: Setup, other: Setup, job) -> list[str]:
    run(plugins.train_and_save, setup, str(job))
    run(plugins.load_and_save_again, other, str(job))
    return plugins.differences(job / f"epoch-0_step-{STEPS}", job / f"epoch-1_step-{STEPS}")


def spoil_and_load(rank, setup, directory, spoil):
    """Return the typed error that a load ends with, or None."""
    from elastic_ckpt import load_checkpoint
    from elastic_ckpt.errors import ElasticCkptError
    from tests.checkpoints import seal_again

    if rank == 0:
        place = plugins.Path(directory) / f"epoch-0_step-{STEPS}"
        spoil(place)
        seal_again(place)
    import torch.distributed as dist

    dist.barrier()
    try:
        load_checkpoint(directory, *plugins.build(setup).state)
    except ElasticCkptError as error:
        return [type(error), str(error)]
    return None


def without_a_shard(place):
    next((place / "optimizer").glob("pytorch_optim-*.bin")).unlink()


def without_a_parameter(place):
    (index,) = (place / "modeling").glob("*.index.json")
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))


def without_an_index(place):
    next((place / "modeling").glob("*.index.json")).unlink()


def of_another_size(place):
    path = next((place / "precision").glob("masters-*-00000-of-*.safetensors"))
    path.write_bytes(next((place / "precision").glob("masters-pp0of2-*")).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (without_a_shard, CheckpointError, "lacks optimizer/pytorch_optim-"),
        slow(without_a_parameter, CheckpointError, "lacks model.norm.weight in modeling/"),
        slow(without_an_index, CheckpointRejected, "modeling/ has no index"),
        slow(of_another_size, CheckpointRejected, "precision/ in epoch-0_step-2 is not readable"),
    ],
)
def test_incomplete_checkpoint_is_an_error(spoil, error, text, tmp_path):
    """A damaged checkpoint that verifies, because it was sealed again."""
    setup = named("Hybrid pp2 bf16 (llama)")
    run(plugins.train_and_save, setup, str(tmp_path))
    for found, message in run_ranks(spoil_and_load, 2, setup, str(tmp_path), spoil):
        assert issubclass(found, error) and text in message


def save_without(rank, setup, directory, kind):
    """Return the error of ``save_checkpoint`` with a booster that leaves something out."""
    from elastic_ckpt import save_checkpoint

    built = plugins.build(setup)
    plugins.train(built, 0, 1)
    name = f"save_{'model' if kind == 'modeling' else 'optimizer'}"
    plain = getattr(built.booster, name)

    def forgetful(thing, path, **options):
        plain(thing, path, **options)
        for index in plugins.Path(path).glob("*.index.json"):
            content = json.loads(index.read_text())
            content["weight_map"].popitem()
            index.write_text(json.dumps(content))

    setattr(built.booster, name, forgetful)
    with pytest.raises(SaveFailed) as caught:
        save_checkpoint(directory, *built.state, 0, 1, 4, None)
    return [str(caught.value)]


@pytest.mark.parametrize("kind", ["modeling", slow("optimizer")])
def test_incomplete_save_is_not_sealed(kind, tmp_path):
    setup = named("LowLevelZero 1 bf16")
    for (message,) in run_ranks(save_without, 2, setup, str(tmp_path), kind):
        assert "ColossalAI left out" in message and f"in {kind}/" in message
    assert not list(tmp_path.glob("epoch-*"))
    assert not list((tmp_path / ".attempts").iterdir())


# -- the shim ---------------------------------------------------------------------------------

NEEDED_BY = {
    "streams": "LowLevelZero 1 bf16",
    "device": "LowLevelZero 1 fp16",
    "random states": "Hybrid tp2 fp32 (llama)",
    "ZeRO's device check": "LowLevelZero 1 bf16",
    "record_stream": "LowLevelZero 1 bf16",
    "calls of CUDA": "MoE ep2 zero1 bf16 (mixtral)",
    "Adam's kernel": "Gemini bf16, one chunk",
    "FSDP's copies to the host": "TorchFSDP fp32",
    "Gemini's chunks": "Gemini bf16, one chunk",
    "Huawei's backend": "Hybrid pp2 fp32 (llama)",
}


@pytest.mark.slow
@pytest.mark.parametrize("piece", NEEDED_BY)
def test_each_piece_of_the_shim_is_needed(piece, tmp_path):
    """Fails when ColossalAI or torch has fixed it: then the piece can be removed."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("the shim is for machines without a GPU")
    setup = named(NEEDED_BY[piece])
    results = run_ranks(
        plugins.train_and_save, setup.ranks, setup, str(tmp_path), piece, seconds=60
    )
    assert not all(isinstance(result, tuple) and isinstance(result[0], dict) for result in results)


def test_every_piece_of_the_shim_is_tested():
    assert run_ranks(pieces_of_the_shim, 1) == [sorted(NEEDED_BY)]


def pieces_of_the_shim(rank):
    from elastic_ckpt.training.engines.colossalai.cpu_shim import PIECES

    return sorted(PIECES)

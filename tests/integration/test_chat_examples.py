"""The ColossalChat examples, preempted and killed, end like undisturbed ones."""

import json
from pathlib import Path

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from tests.job import Job

pytestmark = [pytest.mark.one_torch, pytest.mark.slow]

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = ("--max-epochs", "2", "--samples", "161", "--save-interval", "10")


def record(place: Path) -> tuple[dict[str, set[str]], dict[str, str]]:
    """Return each rank's distinct batches with losses, and its final parameters."""
    samples = {path.name: set(path.read_text().splitlines()) for path in place.glob("samples.*")}
    return samples, {path.name: path.read_text() for path in place.glob("parameters.*")}


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("sft.py", ("--plugin", "pp2")),
        ("sft_session.py", ("--plugin", "tp2")),
        ("dpo.py", ("--plugin", "gemini")),
        ("dpo_session.py", ("--plugin", "zero2")),
    ],
    ids=["sft", "sft_session", "dpo", "dpo_session"],
)
def test_disturbed_example_ends_like_an_undisturbed_one(tmp_path, script, options):
    arguments = (*ARGUMENTS, *options)
    calm = tmp_path / "calm-record"
    with Job(tmp_path / "calm", *arguments, "--record", str(calm), script=EXAMPLES / script) as job:
        assert job.start().wait(120) == 0, job.output()
    wild = tmp_path / "wild-record"
    with Job(tmp_path / "wild", *arguments, "--record", str(wild), script=EXAMPLES / script) as job:
        job.start().until_step(5)
        job.process.terminate()
        assert job.wait(60) == 75, job.output()
        assert job.view().newest_intact.reason == "emergency"
        job.start().until_training()
        job.until(lambda view: view.newest_intact.reason == "interval", "an interval's save")
        job.workers()[1].kill()
        assert job.wait(120) == 0, job.output()
    assert record(wild) == record(calm)
    samples, parameters = record(calm)
    assert len(samples) == len(parameters) == 2
    lines = [json.loads(line) for rank in samples.values() for line in rank]
    for epoch in (0, 1):
        used = {sample for at, batch, _ in lines if at == epoch for sample in batch}
        assert len(used) >= 160  # two ranks leave one sample over


def test_lora_adapter_is_read_by_peft(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    arguments = ("--max-epochs", "1", "--samples", "80", "--plugin", "hybrid", "--lora")
    with Job(tmp_path, *arguments, script=EXAMPLES / "sft.py") as job:
        assert job.start().wait(120) == 0, job.output()
        adapter = job.directory / "adapter"
    base = AutoModelForCausalLM.from_config(config())
    model = PeftModel.from_pretrained(base, adapter)
    assert any(
        value.abs().max() > 0 for name, value in model.state_dict().items() if "lora_B" in name
    )


def config():
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
    )


def test_saved_model_is_read_by_transformers(tmp_path):
    """ColossalAI writes weights and configuration only."""
    import torch
    from transformers import AutoModelForCausalLM

    arguments = ("--max-epochs", "1", "--samples", "80", "--plugin", "ddp")
    record_place = tmp_path / "record"
    script = EXAMPLES / "sft_session.py"
    with Job(tmp_path, *arguments, "--record", str(record_place), script=script) as job:
        assert job.start().wait(120) == 0, job.output()
        newest = job.view().newest_intact
    model = AutoModelForCausalLM.from_pretrained(
        Path(newest.path) / "modeling", torch_dtype=torch.float32
    )
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(name.encode() + value.detach().view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == (record_place / "parameters.0").read_text()

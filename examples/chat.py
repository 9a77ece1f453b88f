"""Shared by the examples in ColossalChat's shape: a tiny Llama, tokenized text, a plugin, a record.

Nothing is downloaded: the model is made from a configuration, and the text is the Python standard
library's own, a byte for a token.
"""

import argparse
import hashlib
import json
import os
import sysconfig
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")  # ColossalAI's imports warn a lot

import colossalai
import torch
import torch.distributed as dist
from colossalai.booster import Booster, plugin
from colossalai.cluster import DistCoordinator
from colossalai.nn.optimizer import HybridAdam
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_training

IGNORED = -100
PROMPT = 16
LENGTH = 48

PLUGINS = {
    "ddp": lambda: plugin.TorchDDPPlugin(),
    "zero1": lambda: plugin.LowLevelZeroPlugin(stage=1, precision="bf16", max_norm=1.0),
    "zero2": lambda: plugin.LowLevelZeroPlugin(stage=2, precision="bf16", max_norm=1.0),
    "gemini": lambda: plugin.GeminiPlugin(
        precision="bf16",
        enable_gradient_accumulation=True,
        enable_async_reduce=torch.cuda.is_available(),
    ),
    "hybrid": lambda: plugin.HybridParallelPlugin(
        tp_size=1, pp_size=1, zero_stage=1, precision="bf16", max_norm=1.0
    ),
    "tp2": lambda: plugin.HybridParallelPlugin(
        tp_size=2, pp_size=1, precision="bf16", max_norm=1.0, parallel_output=False
    ),
    "pp2": lambda: plugin.HybridParallelPlugin(
        tp_size=1, pp_size=2, num_microbatches=2, precision="bf16", max_norm=1.0
    ),
    "tp2-zero1": lambda: plugin.HybridParallelPlugin(
        tp_size=2, pp_size=1, zero_stage=1, precision="bf16", max_norm=1.0, parallel_output=False
    ),
}


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--plugin", choices=PLUGINS, default="zero1")
    parser.add_argument("--save-dir", default=os.environ.get("ELASTIC_CKPT_DIR", "checkpoints"))
    parser.add_argument("--max-epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation-steps", type=int, default=2)
    parser.add_argument("--save-interval", type=int, default=25)
    parser.add_argument("--lora", action="store_true", help="train an adapter, with peft")
    parser.add_argument("--record", type=Path, help="where to note used samples and a digest")
    return parser.parse_args()


def launch(args: argparse.Namespace) -> tuple[Booster, DistCoordinator]:
    """Launch as under ``colossalai run`` or torchrun, or as a single process."""
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 29512)):
        os.environ.setdefault(name, str(value))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    patch_training()  # does nothing if there is a GPU
    Path(args.save_dir).mkdir(parents=True, exist_ok=True)  # loading from a missing one is an error
    colossalai.launch_from_torch(seed=42, verbose=False)
    return Booster(plugin=PLUGINS[args.plugin]()), DistCoordinator()


def make_model(booster: Booster, lora: bool = False) -> torch.nn.Module:
    torch.manual_seed(42)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=LENGTH,
        use_cache=False, attn_implementation="eager", attention_dropout=0.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if lora:
        from peft import LoraConfig

        adapter = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj"])
        model = booster.enable_lora(model, lora_config=adapter)
    return model


def make_optimizer(
    booster: Booster, model: torch.nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, object]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gemini = isinstance(booster.plugin, plugin.GeminiPlugin)  # accepts only its own optimizers
    optimizer = (HybridAdam if gemini else torch.optim.AdamW)(trained, lr=2e-3)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(steps, 1))


class Conversations(Dataset):
    """Prompts with a right and a wrong answer, as tokens."""

    def __init__(self, samples: int) -> None:
        wanted = samples * LENGTH
        text = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += path.read_bytes()
            if len(text) >= wanted:
                break
        self.windows = torch.frombuffer(text[:wanted], dtype=torch.uint8).view(-1, LENGTH).long()

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chosen = self.windows[index]
        rejected = torch.cat([chosen[:PROMPT], self.windows[index - 1][PROMPT:]])
        return {"index": torch.tensor(index), "chosen": chosen, "rejected": rejected}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def tokens(batch: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    """Return a model's inputs; the loss does not include the prompt."""
    ids = batch[key].to(device())
    labels = ids.clone()
    labels[:, :PROMPT] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def learn(
    booster: Booster,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, torch.Tensor],
    accumulation_steps: int,
) -> torch.Tensor:
    """Run forward and backward over the answers, and return their mean loss."""
    inputs = tokens(batch, "chosen")
    if getattr(booster.plugin, "pp_size", 1) == 1:
        loss = model(**inputs).loss
        booster.backward(loss / accumulation_steps, optimizer)
        return loss
    done = booster.execute_pipeline(
        iter([inputs]),
        model,
        lambda outputs, _: outputs.loss / accumulation_steps,
        optimizer,
        return_loss=True,
    )
    loss = torch.zeros((), device=device())
    if done["loss"] is not None:  # only the last stage knows it
        loss += done["loss"].detach() * accumulation_steps
    dist.all_reduce(loss, group=booster.plugin.pp_group)
    return loss


def answer_log_probability(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return each answer's log-probability, [batch]; ``logits`` is [batch, length, 256]."""
    targets = labels[:, 1:]
    each = logits[:, :-1].float().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])
    return (each[..., 0] * (targets != IGNORED)).sum(-1)


def preference_loss(
    model: torch.nn.Module, reference: torch.nn.Module, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Return the DPO loss (Rafailov et al. 2023) with beta 0.1."""
    margins = []
    for key in ("chosen", "rejected"):
        inputs = tokens(batch, key)
        labels = inputs.pop("labels")
        with torch.no_grad():
            before = answer_log_probability(reference(**inputs).logits, labels)
        margins.append(answer_log_probability(model(**inputs).logits, labels) - before)
    return -functional.logsigmoid(0.1 * (margins[0] - margins[1])).mean()


class Record:
    """Append what a run must have in common with an undisturbed one to ``--record``."""

    def __init__(self, place: Path | None) -> None:
        self.place = place
        if place:
            place.mkdir(parents=True, exist_ok=True)

    def batch(self, epoch: int, batch: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        if self.place:
            line = json.dumps([epoch, batch["index"].tolist(), loss.item()])
            with open(self.place / f"samples.{dist.get_rank()}", "a") as file:
                file.write(line + "\n")

    def end(self, model: torch.nn.Module) -> None:
        if self.place:
            digest = hashlib.sha256()
            for name, value in sorted(model.unwrap().named_parameters()):
                data = value.detach().cpu().contiguous().view(torch.uint8)
                digest.update(name.encode() + data.numpy().tobytes())
            (self.place / f"parameters.{dist.get_rank()}").write_text(digest.hexdigest())

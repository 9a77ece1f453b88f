"""A small GPT2 under Hugging Face's Trainer; prints a digest of weights and optimizer.

usage: hf_trainer.py OUT [key=value ...]: the Trainer's arguments, and those of ``main``.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from elastic_ckpt.integrations.transformers import ElasticCallback


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 44

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": drawn, "labels": drawn}


class Trace(TrainerCallback):
    """Writes each step as it ends, and makes it last."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self.seconds)
        with open(f"{args.output_dir}/trace.{args.process_index}", "a") as out:
            print(state.global_step, file=out)


def digest(trainer: Trainer) -> str:
    found = hashlib.sha256()
    for name, value in trainer.model.state_dict().items():
        found.update(name.encode() + value.numpy().tobytes())
    for entry in trainer.optimizer.state_dict()["state"].values():
        for name, value in sorted(entry.items()):
            found.update(name.encode() + value.numpy().tobytes())
    found.update(json.dumps(trainer.lr_scheduler.state_dict(), default=str).encode())
    found.update(torch.get_rng_state().numpy().tobytes())
    return found.hexdigest()


def main(out: str, *pairs: str) -> None:
    options = {key: json.loads(value) for key, value in (pair.split("=", 1) for pair in pairs)}
    count, resumes = options.pop("callbacks", 1), options.pop("resumes", True)
    slow = options.pop("slow", 0)
    torch.manual_seed(5)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2,
        resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    defaults = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 3,
        "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "warmup_steps": 3,
        "save_steps": 4, "logging_steps": 2, "use_cpu": True, "report_to": "none", "seed": 3,
        "disable_tqdm": True,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=out, **(defaults | options))
    Path(out).mkdir(parents=True, exist_ok=True)
    trainer = Trainer(
        GPT2LMHeadModel(config), arguments, train_dataset=Tokens(), eval_dataset=Tokens(),
        callbacks=[*(ElasticCallback() for _ in range(count)), Trace(slow)],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=ElasticCallback.newest() if count and resumes else None)
    Path(f"{out}/digest.{arguments.process_index}").write_text(digest(trainer))


main(*sys.argv[1:])

"""Supervised fine-tuning of a tiny GPT-2 with TRL. usage: trl_sft.py OUT CALLBACKS SECONDS"""

import hashlib
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from elastic_ckpt.integrations.transformers import ElasticCallback


class Trace(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(float(sys.argv[3]))
        with open(f"{args.output_dir}/trace.0", "a") as out:
            print(state.global_step, file=out)


out, count = sys.argv[1], int(sys.argv[2])
Path(out).mkdir(parents=True, exist_ok=True)
words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n + 3 for n in range(40)}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
torch.manual_seed(5)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=1, pad_token_id=0,
    )
)  # fmt: skip
lines = [" ".join(f"w{(7 * n + m * m) % 40}" for m in range(5 + n % 9)) for n in range(40)]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=out, per_device_train_batch_size=2, max_steps=18, save_steps=5, report_to="none",
        learning_rate=1e-2, use_cpu=True, bf16=False, disable_tqdm=True, max_length=32,
        gradient_checkpointing=False,
    ),
    train_dataset=Dataset.from_dict({"text": lines}),
    processing_class=PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ),
    callbacks=[*(ElasticCallback() for _ in range(count)), Trace()],
)  # fmt: skip
trainer.train(resume_from_checkpoint=ElasticCallback.newest() if count else None)
found = hashlib.sha256()
for value in trainer.model.state_dict().values():
    found.update(value.numpy().tobytes())
for entry in trainer.optimizer.state_dict()["state"].values():
    for value in entry.values():
        found.update(value.numpy().tobytes())
Path(out, "digest.0").write_text(found.hexdigest())

"""A small GPT-2 on random tokens with Hugging Face's Trainer; three lines are elastic-ckpt's.

elastic-ckpt run --dir runs/lm examples/hf_lm.py --output_dir out
"""

from dataclasses import dataclass, field

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from elastic_ckpt.integrations.transformers import ElasticCallback  # 1


@dataclass
class ModelArguments:
    n_layer: int = field(default=2)
    n_embd: int = field(default=32)
    block_size: int = field(default=32)
    samples: int = field(default=256)


class RandomBlocks(torch.utils.data.Dataset):
    """Stands for a tokenized corpus, grouped into blocks."""

    def __init__(self, count: int, size: int) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.blocks = torch.randint(256, (count, size), generator=drawn)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, TrainingArguments))
    sizes, training_args = parser.parse_args_into_dataclasses()
    set_seed(training_args.seed)
    config = GPT2Config(
        vocab_size=256,
        n_positions=sizes.block_size,
        n_layer=sizes.n_layer,
        n_head=4,
        n_embd=sizes.n_embd,
        bos_token_id=0,
        eos_token_id=0,
    )
    trainer = Trainer(
        model=GPT2LMHeadModel(config),
        args=training_args,
        train_dataset=RandomBlocks(sizes.samples, sizes.block_size),
        callbacks=[ElasticCallback()],  # 2
    )
    trainer.train(resume_from_checkpoint=ElasticCallback.newest())  # 3
    trainer.save_model(f"{training_args.output_dir}/final")


if __name__ == "__main__":
    main()

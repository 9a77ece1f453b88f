"""Train a small byte-level GPT with ColossalAI on the Python standard library's own sources.

Runs alone, under torchrun, and under a supervisor that saves and restarts it:

    elastic-ckpt run --dir ckpt --nproc 2 -- examples/byte_gpt.py --epochs 2

What elastic-ckpt adds to a plain ColossalAI script is marked with (1) to (5).
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
from colossalai.booster import Booster
from colossalai.booster.plugin import TorchDDPPlugin
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from elastic_ckpt import ElasticSampler, Session  # (1)

CONTEXT = 64


class SourceText(Dataset):
    """Windows of ``CONTEXT + 1`` bytes of the standard library's sources, in a fixed order."""

    def __init__(self, samples: int) -> None:
        wanted = samples * (CONTEXT + 1)
        text = bytearray()
        for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += path.read_bytes()
            if len(text) >= wanted:
                break
        self.windows = torch.frombuffer(text[:wanted], dtype=torch.uint8).view(-1, CONTEXT + 1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"index": torch.tensor(index), "text": self.windows[index].long()}


class ByteGPT(nn.Module):
    """A GPT of bytes: causal attention, learned positions, dropout."""

    def __init__(self, width: int = 96, heads: int = 4, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Mean loss of predicting each byte from those before it; ``text`` is [batch, 65]."""
        inputs, targets = text[:, :-1], text[:, 1:]
        hidden = self.token(inputs) + self.position.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        logits = self.head(self.blocks(hidden, mask=mask, is_causal=True))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=1600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--save-interval", type=int, default=25)
    parser.add_argument("--record", type=Path, help="where to note used samples and a digest")
    args = parser.parse_args()

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(name, value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29511")
    colossalai.launch_from_torch(seed=7, verbose=False)
    plugin = TorchDDPPlugin()
    booster = Booster(plugin=plugin)
    model = ByteGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
    dataloader = plugin.prepare_dataloader(
        SourceText(args.samples),
        batch_size=args.batch_size,
        shuffle=True,
        distributed_sampler_cls=ElasticSampler,  # (2)
    )
    model, optimizer, _, dataloader, lr_scheduler = booster.boost(
        model, optimizer, dataloader=dataloader, lr_scheduler=lr_scheduler
    )

    with Session(  # (3)
        os.environ.get("ELASTIC_CKPT_DIR", "checkpoints"),
        booster=booster,
        model=model,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        save_interval=args.save_interval,
    ) as session:
        for epoch in session.epochs(args.epochs):  # (4)
            for batch in session.batches(dataloader):  # (5)
                loss = model(batch["text"])
                booster.backward(loss, optimizer)
                optimizer.step()
                optimizer.zero_grad()
                lr_scheduler.step()
                if args.record:
                    note_step(args.record, session.step + 1, epoch, batch["index"], loss)
    if args.record and dist.get_rank() == 0:
        note_end(args.record, model)


def note_step(record: Path, step: int, epoch: int, index: torch.Tensor, loss: torch.Tensor) -> None:
    """One line per rank and step: what a run must have in common with an undisturbed one."""
    record.mkdir(parents=True, exist_ok=True)
    line = json.dumps([step, epoch, index.tolist(), loss.item()])
    with open(record / f"samples.{dist.get_rank()}", "a") as file:
        file.write(line + "\n")


def note_end(record: Path, model: nn.Module) -> None:
    """A digest of the final parameters."""
    digest = hashlib.sha256()
    for name, value in sorted(model.unwrap().state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    (record / "parameters").write_text(digest.hexdigest())


if __name__ == "__main__":
    main()

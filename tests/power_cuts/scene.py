"""The job whose power is cut: what it saves at each step, known to both sides.

``guest`` makes the saves where every block is recorded, ``replay`` looks at what they left.
"""

from __future__ import annotations

import io
import random
import zipfile
from functools import cache
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.reports import Reports
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.own_saves import own_saves
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import unwatched

RANKS: Final = 2
STEPS: Final = tuple(range(10, 130, 10))
LARGE_AT: Final = 30
"""At this step rank 0 has a file that is written past the page cache."""

DAMAGED_AT: Final = 70
"""The checkpoint of this step is damaged and set aside."""

KEPT: Final = Retention(last=3)
MARKER: Final = "state.json"
OVERWRITTEN: Final = "last.pt"


@cache
def contents(step: int, rank: int) -> dict[str, bytes]:
    """Return a rank's files, as ColossalAI lays them out, with other bytes and sizes each time."""
    dice = random.Random(f"{step} {rank}")
    size = 9_000_000 if (step, rank) == (LARGE_AT, 0) else 40_000 + step * 100 + rank
    files = {
        f"modeling/{rank:05d}.safetensors": dice.randbytes(size),
        f"optimizer/{rank:05d}.bin": dice.randbytes(30_000 + 7 * step),
        f"ranks/{rank:05d}.json": b'{"rank":%d,"step":%d}' % (rank, step),
    }
    if rank == 0:
        files["lr_scheduler"] = dice.randbytes(500)
        files["running_states.json"] = b'{"step":%d}' % step
    return files


@cache
def script_contents(step: int) -> dict[str, bytes]:
    """Return the files of the script's own checkpoint, in the order in which it writes them."""
    dice = random.Random(f"script {step}")
    header = b'{"w":{"data_offsets":[0,50000]}}'
    return {
        "model.safetensors": len(header).to_bytes(8, "little") + header + dice.randbytes(50_000),
        "optimizer.bin": archive(step, 40_000),
        MARKER: b'{"step":%d}' % step,
    }


@cache
def archive(step: int, size: int = 60_000) -> bytes:
    """Return an archive as ``torch.save`` makes one: stored, with checksums."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        entry = zipfile.ZipInfo("archive/data.pkl")
        file.writestr(entry, random.Random(f"archive {step}").randbytes(size + step))
    return data.getvalue()


def keeper(job: JobDirectory, place: Path, run: int) -> OwnKeeper:
    """Return the keeper of the script's own checkpoints below ``place``."""
    rules = own_saves(
        watch=("out/step-*", OVERWRITTEN), complete_when=MARKER, on_notice=None, resume_args=(),
        finished_when=None,
    )  # fmt: skip
    reports = Reports(lambda _: None, lambda *_: None, unwatched, lambda _: None)
    return OwnKeeper(job, rules, place, run, Retention(), reports)

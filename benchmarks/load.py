"""How long a load takes, with the verification before it.

Two ranks hold the same model and optimizer. From memory: our load of the memory tier against
safetensors reading the same tensors from shared memory and copying them into place. From a cold
disk: our verification and load against a raw read of the same files, which the ranks share out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from harness import Options, Places, Report, Row, goal, places, ratios, read_options, summary
from ranks import run_ranks

MEMORY_FLOOR = "safetensors + copy, from memory"
MEMORY_OURS = "elastic-ckpt, from the memory tier"
DISK_FLOOR = "raw read, from a cold disk"
DISK_OURS = "elastic-ckpt verify + load, from a cold disk"


def contest(rank: int, options: Options, where: Places) -> tuple[dict[str, list[float]], str]:
    """Seconds of each pass by name; and why nothing was loaded from memory, if so."""
    import torch.distributed as dist
    from safetensors.torch import save_file
    from savers import Ours, OursMemory, flat_tensors
    from training_state import make_state

    from elastic_ckpt.training.state.load import load_newest

    state = make_state(options.megabytes, wrap=True)
    floor = where.memory / "floor.safetensors"
    if rank == 0:
        save_file(flat_tensors(state), floor)
    disk, memory = (kind(rank, state, where) for kind in (Ours, OursMemory))
    disk.save(1)
    memory.save(1)
    dist.barrier()
    files = [path for path in disk.job.checkpoint(0, 1).rglob("*") if path.is_file()]
    acts: dict[str, Callable[[], object]] = {
        MEMORY_FLOOR: partial(_copy_in, floor, flat_tensors(state)),
        MEMORY_OURS: partial(load_newest, memory.runtime, memory.engine),
        DISK_FLOOR: partial(_read_raw, sorted(files), rank),
        DISK_OURS: partial(load_newest, disk.runtime, disk.engine),
    }
    found: dict[str, list[float]] = {name: [] for name in acts}
    why_not = ""
    try:
        for turn in range(options.repeats + 1):
            for name, act in acts.items():
                _forget(files)
                dist.barrier()
                began = time.perf_counter()
                loaded = act()
                dist.barrier()
                if name in (MEMORY_OURS, DISK_OURS) and loaded is None:
                    why_not = "this version does not load from memory"
                elif turn:
                    found[name].append(time.perf_counter() - began)
    finally:
        disk.close()
        memory.close()
    return found, why_not


def _copy_in(path: Path, targets: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file

    with torch.no_grad():
        for name, tensor in load_file(path).items():
            targets[name].copy_(tensor)


def _read_raw(files: list[Path], rank: int) -> None:
    """Every byte once, each file by one of the ranks as the verification shares them out."""
    buffer = bytearray(2 * 1024 * 1024)
    for path in sorted(files, key=lambda one: -one.stat().st_size)[rank::2]:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _forget(files: list[Path]) -> None:
    """Drop them from the page cache."""
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Print the table."""
    options = read_options(__doc__)
    with places(options.directory) as where:
        found, why_not = run_ranks(contest, where.disk / "log", options, where)[0]
    title = f"Load, {options.megabytes:.0f} MB of state into each of 2 ranks"
    report = Report("load", title, {"megabytes": options.megabytes, "ranks": 2})
    for ours, floor, limit in ((MEMORY_OURS, MEMORY_FLOOR, 1.2), (DISK_OURS, DISK_FLOOR, 1.1)):
        report.rows.append(summary(floor, found[floor], found[floor]))
        if not found[ours]:
            report.rows.append(Row(ours, note=f"not measured: {why_not}"))
            continue
        report.rows.append(summary(ours, found[ours], found[floor]))
        what = f"load + verify: {ours} / {floor}"
        report.goals.append(goal(what, ratios(found[ours], found[floor]), limit))
    report.show(options)


if __name__ == "__main__":
    main()

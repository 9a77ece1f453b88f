"""How long training stands still for one save of a ColossalAI job.

Two ranks under TorchDDPPlugin on CPUs hold the same model and AdamW state and take turns at:
ColossalAI's own sharded save, to a directory on the disk and to one in shared memory, without
fsync, as it is shipped; this package's save into the memory tier, from the call to the seal, in
the steady state (both generations have been written before); and the floor, a memcpy of the same
bytes into mapped pages that were written before, by one rank and shared by both. Prints medians,
spreads and ratios. The goal is a quarter of ColossalAI's own save.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GOAL = 0.25
RANKS = 2
START_SECONDS = 120
SHM = Path("/dev/shm")
PLACES = "COLOSSALAI_SAVE_PLACES"

OURS = "this package, memory tier"
DISK = "ColossalAI, disk"
MEMORY = "ColossalAI, shared memory"
FLOOR = "memcpy, one rank"
SHARED_FLOOR = "memcpy, both ranks"


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=1536, help="MB of model and optimizer state")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", default=".", help="on the disk that is to be measured")
    parser.add_argument("--json", metavar="FILE", help="where the seconds go as JSON")
    options = parser.parse_args()
    if "RANK" in os.environ:
        take_part(options)
        return
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
        str(RANKS), __file__, *sys.argv[1:],
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    limit = START_SECONDS + options.rounds * options.size / 20
    with (
        tempfile.TemporaryDirectory(dir=options.directory, prefix=".colossalai-save-") as disk,
        tempfile.TemporaryDirectory(dir=SHM, prefix="colossalai-save-") as memory,
    ):
        environment |= {PLACES: f"{disk}{os.pathsep}{memory}"}
        code = subprocess.run(command, env=environment, timeout=limit).returncode
    raise SystemExit(code)


def take_part(options: argparse.Namespace) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    disk, memory = map(Path, os.environ[PLACES].split(os.pathsep))
    found = measure(*make_state(options.size), disk, memory, options.rounds)
    if dist.get_rank() == 0:
        report(found, options)
    dist.barrier()
    os._exit(0)  # destroying the process group while a DDP model is alive can deadlock


def make_state(megabytes: int) -> tuple[Any, Any, Any]:
    """Booster, model and optimizer of about that size, after a first step."""
    import torch
    from colossalai.booster import Booster
    from colossalai.booster.plugin import TorchDDPPlugin

    from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_loads

    patch_loads()
    width = 1024 if megabytes >= 512 else 128
    blocks = max(1, round(megabytes * 1e6 / (3 * 4 * 8 * width**2)))
    layers = [
        part
        for _ in range(blocks)
        for part in (
            torch.nn.Linear(width, 4 * width),
            torch.nn.GELU(),
            torch.nn.Linear(4 * width, width),
            torch.nn.LayerNorm(width),
        )
    ]
    model: Any = torch.nn.Sequential(*layers)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4)
    booster = Booster(plugin=TorchDDPPlugin())
    model, optimizer, *_ = booster.boost(model, optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    return booster, model, optimizer


def measure(
    booster: Any, model: Any, optimizer: Any, disk: Path, memory: Path, rounds: int
) -> dict[str, list[float]]:
    """Seconds of each subject, by name; every rank comes along."""
    runs = itertools.count()
    ours = MemorySave(booster, model, optimizer, disk / "job", memory)
    floor = Memcpy(model, optimizer)

    def colossalai(place: Path) -> Callable[[], None]:
        def save() -> None:
            booster.save_model(model, str(place / "modeling"), shard=True)
            booster.save_optimizer(optimizer, str(place / "optimizer"), shard=True)

        return save

    subjects: dict[str, Callable[[], None]] = {
        DISK: colossalai(disk / "own"),
        MEMORY: colossalai(memory / "own"),
        OURS: ours.save,
        FLOOR: floor.alone,
        SHARED_FLOOR: floor.shared,
    }
    for _ in range(2):  # both generations
        ours.save()
        ours.settle()
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(rounds):
        order = sorted(subjects) if next(runs) % 2 else sorted(subjects, reverse=True)
        for name in order:
            seconds[name].append(together(subjects[name]))
            ours.settle()
            remove(disk / "own", memory / "own")
    ours.close()
    return seconds


def together(act: Callable[[], None]) -> float:
    """Seconds from when all ranks begin until all are done."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - began


def remove(*places: Path) -> None:
    """Remove what was saved, and let the disk come to rest. Collective."""
    import torch.distributed as dist

    dist.barrier()
    if dist.get_rank() == 0:
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        os.sync()
    dist.barrier()


class MemorySave:
    """This package's save, with a memory tier that is always on disk already."""

    def __init__(self, booster: Any, model: Any, optimizer: Any, job: Path, memory: Path) -> None:
        import torch.distributed as dist

        from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
        from elastic_ckpt.checkpoint.memory.owned_tier import OwnedTier
        from elastic_ckpt.checkpoint.memory.owner import tier_path
        from elastic_ckpt.checkpoint.memory.tier import MemoryTier
        from elastic_ckpt.training.engines import EngineInputs
        from elastic_ckpt.training.engines.colossalai.engine import ColossalAIEngine
        from elastic_ckpt.training.runtime import join
        from elastic_ckpt.training.tensors.device_copy import pin, unpin

        self._runtime = join(job)
        self._runtime.memory = None
        self._engine = ColossalAIEngine(EngineInputs(booster, model, optimizer, None))
        self._steps = itertools.count(1)
        leads = dist.get_rank() == 0
        self._owned = OwnedTier(memory, self._runtime.job, "node") if leads else None
        dist.barrier()
        self._tier = MemoryTier(tier_path(memory, self._runtime.job), Mappings(pin, unpin))
        self._runtime.memory = self._tier

    def save(self) -> None:
        """Save and seal."""
        from elastic_ckpt.checkpoint.position import Position
        from elastic_ckpt.training.state.save import write_checkpoint
        from elastic_ckpt.training.state.snapshot import Snapshot

        step = next(self._steps)
        position = Position(epoch=0, step=step, sample_start_index=step)
        write_checkpoint(self._runtime, self._engine, Snapshot("interval", position, {}))

    def settle(self) -> None:
        """Say what the drain says when it is done, so that the next save may take its place."""
        import torch.distributed as dist

        if dist.get_rank() == 0:
            for one in self._tier.sealed():
                one.generation.settle(one.seal)
        dist.barrier()

    def close(self) -> None:
        """Leave nothing behind."""
        if self._runtime.memory is None:
            raise SystemExit("the memory tier had no room: try a smaller --size")
        if self._owned is not None:
            self._owned.release(remove=True)


class Memcpy:
    """The same tensors into shared memory that was written before."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        moments = [t for state in optimizer.unwrap().state.values() for t in state.values()]
        tensors = [t.detach().reshape(-1).numpy() for t in [*model.parameters(), *moments]]
        self._sources = [memoryview(tensor).cast("B") for tensor in tensors]
        self.bytes = sum(map(len, self._sources))
        self._target = memoryview(mmap.mmap(-1, self.bytes))
        self._copy(self._sources)

    def alone(self) -> None:
        """Rank 0 copies everything."""
        import torch.distributed as dist

        if dist.get_rank() == 0:
            self._copy(self._sources)

    def shared(self) -> None:
        """Each rank copies its half of every tensor."""
        import torch.distributed as dist

        begin, end = dist.get_rank(), dist.get_rank() + 1
        self._copy([s[begin * len(s) // RANKS : end * len(s) // RANKS] for s in self._sources])

    def _copy(self, sources: Sequence[memoryview]) -> None:
        at = 0
        for source in sources:
            self._target[at : at + len(source)] = source
            at += len(source)


def report(seconds: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print the table; write the JSON."""
    import colossalai
    import torch

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    heads = f"{'median':>8} {'min':>8} {'max':>8}"
    print(f"{'':30} {heads}  of ColossalAI's: {'disk':>6} {'memory':>6}")
    for name, times in seconds.items():
        ratios = [medians[name] / medians[DISK], medians[name] / medians[MEMORY]]
        print(
            f"{name:30} {medians[name]:7.3f}s {min(times):7.3f}s {max(times):7.3f}s"
            f"  {'':15} {ratios[0]:7.3f} {ratios[1]:6.3f}"
        )
    worst = max(medians[OURS] / medians[DISK], medians[OURS] / medians[MEMORY])
    print(f"stall / ColossalAI's own, the worse of the two: {worst:.3f} (goal <= {GOAL})")
    print(
        f"{os.cpu_count()} cores, python {platform.python_version()}, torch {torch.__version__}, "
        f"ColossalAI {colossalai.__version__}, {options.size} MB, {options.rounds} rounds"
    )
    if options.json:
        content = {
            "size_megabytes": options.size,
            "torch": torch.__version__,
            "colossalai": colossalai.__version__,
            "seconds": seconds,
            "median_seconds": medians,
            "ratio_to_disk": medians[OURS] / medians[DISK],
            "ratio_to_memory": medians[OURS] / medians[MEMORY],
            "ratio_to_memcpy": medians[OURS] / medians[FLOOR],
            "goal": GOAL,
        }
        Path(options.json).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Whether every damaged checkpoint is found, and what other ways to save notice of the same.

From one seed: builds sealed checkpoints, with ``save_checkpoint`` and with the store alone for four
ranks; damages copies of them, one fault each, spread evenly over the kinds; and asks what
``elastic-ckpt verify --full`` asks. A fault is found if verification fails; for a
sample the real command has to leave with 65, too. Checkpoints that nobody touched must all be
verified. Exits with 1 if a fault was missed or a clean checkpoint refused.

Beside it the peers load their own checkpoint of such a state, damaged in the same ways, into fresh
objects. ``noticed``: an error was raised, or the process crashed or hung. ``silent``: it loaded,
and a value of model, optimizer, scheduler or running states is not the one that was saved. What is
left is harmless: all is bit-identical, as after a flip in padding. A manifest is DCP's
``.metadata`` and ColossalAI's index files. Faults that need more files than a format has, or that
change nothing in it (ColossalAI's index files are the same at every step), are n/a. A cell is
noticed % (silently wrong %); in the first column every fault that was not found counts as silent,
even one that would do no harm. The last row is over the kinds that a format can have.

Where a fault strikes is drawn by file or by byte, as a coin falls: by byte alone the small files
would hardly be struck.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all on the CPU; a child cannot be forked beside CUDA

import torch
from corruption_peers import (
    PEERS,
    Layout,
    NoSuchFault,
    Peer,
    build,
    forked,
    json_values,
    make_objects,
    observe,
)

import elastic_ckpt
from elastic_ckpt import save_checkpoint
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.manifest import EngineInfo, SealHeader
from elastic_ckpt.checkpoint.verify import MANIFEST_NAME, verify_full
from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.jobdir.paths import JobDirectory

STEPS = 4
EXIT_DATA = 65
DRAWS = 50
OURS = Layout(
    manifests=(MANIFEST_NAME,),
    planted=(
        "modeling/pytorch_model-00002.bin",
        "modeling/more/weights.bin",
        "modeling/.hidden",
        "optimizer/pytorch_optim-00002.bin",
        "optimizer/stray.index.json",
        "ranks/00004.json",
        "ranks/00004.safetensors",
    ),
    running="running_states.json",
    values=json_values("running_states.json"),
)


# -- faults --------------------------------------------------------------------------------------


@dataclass
class Target:
    """A copy of a checkpoint that is about to be damaged."""

    rng: random.Random
    root: Path
    others: Sequence[Path]
    layout: Layout

    def files(self) -> list[str]:
        """Its files, sorted."""
        found = [path for path in self.root.rglob("*") if path.is_file()]
        return sorted(str(path.relative_to(self.root)) for path in found)

    def file(self) -> str:
        """Any file that holds something; by file or by byte."""
        names = self.files()
        sizes = [(self.root / name).stat().st_size for name in names]
        weights = [bool(size) for size in sizes] if self.rng.random() < 0.5 else sizes
        return self.rng.choices(names, weights)[0]

    def manifest(self) -> str:
        """One of the files that say what the others are."""
        if not self.layout.manifests:
            raise NoSuchFault
        return self.rng.choice(self.layout.manifests)

    def value(self) -> tuple[int, int]:
        """Where a value of the running states stands in their file."""
        if not (found := self.layout.values(self.root)):
            raise NoSuchFault
        return self.rng.choice(found)

    def change(self, name: str, start: int, end: int, new: bytes) -> str:
        """Replace some bytes of a file."""
        path = self.root / name
        data = path.read_bytes()
        path.write_bytes(data[:start] + new + data[end:])
        return f"{name}: bytes {start} to {end} of {len(data)} replaced by {len(new)}"

    def size(self, name: str) -> int:
        """Of one file."""
        return (self.root / name).stat().st_size


def _flip_in(target: Target, name: str) -> str:
    offset, bit = target.rng.randrange(target.size(name)), target.rng.randrange(8)
    byte = (target.root / name).read_bytes()[offset] ^ 1 << bit
    target.change(name, offset, offset + 1, bytes([byte]))
    return f"{name}: bit {bit} of byte {offset}"


def flip(target: Target) -> str:
    """One bit of any file."""
    return _flip_in(target, target.file())


def flip_manifest(target: Target) -> str:
    """One bit of a manifest."""
    return _flip_in(target, target.manifest())


def _cut(target: Target, name: str) -> str:
    """Anywhere, and now and then only the last byte, which is the easiest to overlook."""
    size = target.size(name)
    start = size - 1 if target.rng.random() < 0.1 else target.rng.randrange(size)
    return target.change(name, start, size, b"")


def truncate(target: Target) -> str:
    """Any file, cut anywhere."""
    return _cut(target, target.file())


def tear_manifest(target: Target) -> str:
    """A manifest, cut anywhere."""
    return _cut(target, target.manifest())


def extend(target: Target) -> str:
    """Bytes behind the end of any file: zeros, a line's end, or noise."""
    name, count = target.file(), target.rng.randint(1, 4096)
    new = target.rng.choice([b"\n", bytes(count), target.rng.randbytes(count)])
    return target.change(name, target.size(name), target.size(name), new)


def remove(target: Target) -> str:
    """Any file is gone."""
    name = target.rng.choice(target.files())
    (target.root / name).unlink()
    return name


def swap(target: Target) -> str:
    """Two files under each other's names."""
    names = target.files()
    if len(names) < 2:
        raise NoSuchFault
    left, right = target.rng.sample(names, 2)
    between = target.root / ".swapped"
    (target.root / left).rename(between)
    (target.root / right).rename(target.root / left)
    between.rename(target.root / right)
    return f"{left} and {right}"


def zero(target: Target) -> str:
    """A block of zeros where a sector or page was lost."""
    name, block = target.file(), target.rng.choice([64, 512, 4096])
    start = target.rng.randrange(0, target.size(name), block)
    end = min(start + block, target.size(name))
    return target.change(name, start, end, bytes(end - start))


def _take_from_another_step(target: Target, name: str) -> str:
    other = target.rng.choice(target.others)
    shutil.copyfile(other / name, target.root / name)
    return f"{name} of {other.name}"


def other_step(target: Target) -> str:
    """A file of another step; where one file is all there is, that is another checkpoint."""
    names = [name for name in target.files() if name not in target.layout.manifests]
    if len(target.files()) < 2:
        raise NoSuchFault
    return _take_from_another_step(target, target.rng.choice(names))


def other_manifest(target: Target) -> str:
    """The manifest of another step."""
    return _take_from_another_step(target, target.manifest())


def running_value(target: Target) -> str:
    """Another value of the same length in the running states."""
    name, rng = target.layout.running, target.rng
    start, end = target.value()
    if not target.layout.text:
        old = (target.root / name).read_bytes()[start]
        return target.change(name, start, end, bytes([(old + rng.randint(1, 9)) % 256]))
    digits = end - start
    least = 10 ** (digits - 1) if digits > 1 else 0  # JSON knows no leading zeros
    return target.change(name, start, end, b"%d" % rng.randrange(least, 10**digits))


def running_length(target: Target) -> str:
    """A value of another length in the running states, where they have a file of their own."""
    if not target.layout.own_file:
        raise NoSuchFault
    start, end = target.value()
    digits = end - start + target.rng.randint(1, 3)
    new = target.rng.randrange(10 ** (digits - 1), 10**digits)
    return target.change(target.layout.running, start, end, b"%d" % new)


def plant(target: Target) -> str:
    """A file that nobody wrote, where a loader reads: noise, or a copy of a file beside it."""
    if not target.layout.planted:
        raise NoSuchFault
    name = target.rng.choice(target.layout.planted)
    source = target.root / target.rng.choice(target.files())
    noise = target.rng.random() < 0.5
    path = target.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(target.rng.randbytes(512) if noise else source.read_bytes())
    return f"{name}: {'noise' if noise else f'a copy of {source.name}'}"


def link(target: Target) -> str:
    """A link to a copy of the file, inside the checkpoint or outside."""
    name = target.rng.choice(target.files())
    path = target.root / name
    place = target.rng.choice([target.root, target.root.parent]) / f"copy-of-{path.name}"
    path.rename(place)
    path.symlink_to(os.path.relpath(place, path.parent) if target.rng.random() < 0.5 else place)
    return f"{name} -> {place.parent.name}/{place.name}"


KINDS: dict[str, Callable[[Target], str]] = {
    "bit flip in any file": flip,
    "bit flip in the manifest": flip_manifest,
    "truncated file": truncate,
    "extended file": extend,
    "missing file": remove,
    "two files swapped": swap,
    "file of another step": other_step,
    "zeroed block": zero,
    "torn manifest": tear_manifest,
    "manifest of another step": other_manifest,
    "running state, same length": running_value,
    "running state, other length": running_length,
    "extra file": plant,
    "file replaced by a link": link,
}


def damage(
    kind: str, rng: random.Random, root: Path, others: Sequence[Path], layout: Layout
) -> str:
    """Do one fault, and again until it changed something; what was done.

    Raises:
        NoSuchFault: nothing in a checkpoint of this layout can be changed in this way.
    """
    before = _contents(root)
    for _ in range(DRAWS):
        done = KINDS[kind](Target(rng, root, others, layout))
        if _contents(root) != before:
            return done
    raise NoSuchFault


def _contents(root: Path) -> dict[str, Any]:
    return {
        str(path): path.readlink() if path.is_symlink() else path.read_bytes()
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }


# -- checkpoints of ours -------------------------------------------------------------------------


def save_ours(job: Path, seed: int, steps: int, width: int = 32) -> list[Path]:
    """Checkpoints of a torch job, in a child, as a process is part of one job only."""
    return [Path(path) for path in forked(partial(_save_ours, job, seed, steps, width))]


def _save_ours(job: Path, seed: int, steps: int, width: int) -> Iterator[str]:
    objects = make_objects(seed, width)
    for step in range(1, steps + 1):
        objects.train(1)
        save_checkpoint(job, None, objects.model, objects.optimizer, objects.scheduler, 0, step, 8)
        yield str(job / f"epoch-0_step-{step}")


def save_by_store(job: Path, rng: random.Random, step: int, world_size: int) -> Path:
    """A checkpoint of several ranks with contents that are made up, sealed by the store."""
    directory = JobDirectory.at(job)
    directory.prepare()
    attempt = DiskAttempt.begin(directory, step)
    header = _header(attempt.identity, step, world_size)
    running = {"epoch": 0, "step": step, "sample_start_index": step * 8}
    contents = {
        "modeling/pytorch_model-00001.bin": rng.randbytes(rng.randint(1, 8192)),
        "modeling/pytorch_model.bin.index.json": json.dumps({"step": step}).encode(),
        "optimizer/pytorch_optim-00001.bin": rng.randbytes(rng.randint(1, 16384)),
        "optimizer/pytorch_optim_group.bin": rng.randbytes(rng.randint(0, 64)),
        "lr_scheduler": rng.randbytes(500),
        "running_states.json": json.dumps(running, indent=4).encode(),
    }
    files = []
    for rank in range(world_size):
        own = {
            f"ranks/{rank:05d}.json": json.dumps({"rank": rank, "step": step}).encode(),
            f"ranks/{rank:05d}.safetensors": rng.randbytes(rng.randint(1, 4096)),
        } | (contents if rank == 0 else {})
        part = attempt.part(rank)
        for name, data in own.items():
            part.write(name, data)
        files += part.finish(world_size, header if rank == 0 else None)
    return attempt.publish(header, files)


def _header(identity: str, step: int, world_size: int) -> SealHeader:
    return SealHeader(
        job="benchmark",
        attempt=identity,
        incarnation=1,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        reason="interval",
        epoch=0,
        step=step,
        step_in_epoch=step,
        sample_start_index=8 * world_size * step,
        samples_per_step=8 * world_size,
        order_seed=step,
        dataset_fingerprint="made up",
        dataset_size=4096,
        world_size=world_size,
        data_parallel_size=world_size,
        engine=EngineInfo("torch"),
        torch=str(torch.__version__),
    )


def verify_command(path: Path) -> int:
    """The exit code of the real command, with the package that is imported here."""
    package = str(Path(elastic_ckpt.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "verify", "--full", str(path)],
        env=os.environ | {"PYTHONPATH": package},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    ).returncode


# -- measuring -----------------------------------------------------------------------------------


@dataclass
class Cell:
    """Outcomes of one kind of fault in one format."""

    outcomes: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        """Faults that this format could have."""
        return self.outcomes.total() - self.outcomes["n/a"]

    def __str__(self) -> str:
        if not self.count:
            return "n/a"
        noticed = self.outcomes["noticed"] + self.outcomes["crashed"]
        return f"{_percent(noticed, self.count)} ({_percent(self.outcomes['silent'], self.count)})"


def _percent(part: int, whole: int) -> str:
    """Rounded, but 0 and 100 only where it is none and all."""
    value = round(100 * part / whole)
    value = max(value, 1) if part else value
    return f"{min(value, 99) if part < whole else value} %"


Column = dict[str, Cell]


@dataclass
class Result:
    """What a run found."""

    columns: dict[str, Column | None] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    false_alarms: list[str] = field(default_factory=list)
    clean: int = 0
    commands: int = 0


def count_missed(
    result: Result, seed: int, indices: Sequence[int], commands: int, top: Path
) -> None:
    """Damage copies of our checkpoints and check whether verification fails.

    Args:
        commands: how many, from the first, the real command is asked about, too.
    """
    rng = random.Random(f"{seed}/store")
    families = [
        save_ours(top / "functions", seed, STEPS),
        [save_by_store(top / "store", rng, step, 4) for step in range(1, STEPS + 1)],
    ]
    column: Column = {kind: Cell() for kind in KINDS}
    result.columns["elastic-ckpt"] = column
    for index in indices:
        kind = list(KINDS)[index % len(KINDS)]
        rng = random.Random(f"{seed}/{index}")
        roots = rng.choice(families)
        root = rng.choice(roots)
        copy = top / "damaged" / root.name
        shutil.copytree(root, copy, symlinks=True)
        done = damage(kind, rng, copy, [other for other in roots if other != root], OURS)
        found, said = _found(copy)
        if found and result.commands < commands:
            result.commands += 1
            code = verify_command(copy)
            found, said = code == EXIT_DATA, f"; the command left with {code}"
        column[kind].outcomes["noticed" if found else "silent"] += 1
        if not found:
            result.missed.append(
                f"#{index} {kind}, {roots[0].parent.name}/{root.name}: {done}{said}"
            )
        shutil.rmtree(copy.parent)


def why_refused(checkpoint: Path) -> str:
    """Return why ``verify --full`` fails a checkpoint; empty if it is verified."""
    try:
        verify_full(checkpoint)
    except CheckpointError as error:  # an OSError would say nothing about the fault
        return str(error)
    return ""


def _found(checkpoint: Path) -> tuple[bool, str]:
    try:
        return bool(why_refused(checkpoint)), ""
    except Exception as error:  # no verdict: a caller would not know what to do with it
        return False, f"; verifying raised {error!r}"


def count_false_alarms(result: Result, seed: int, count: int, top: Path) -> None:
    """Verify checkpoints that nobody touched, of several shapes, steps and world sizes."""
    rng = random.Random(f"{seed}/clean")
    paths = []
    for number in range(4):
        steps = (count // 2 + number) // 4
        paths += save_ours(top / f"clean-{number}", seed + number, steps, 8 + 9 * number)
    while len(paths) < count:
        step = len(paths)
        paths.append(save_by_store(top / "clean-store", rng, step, rng.randint(1, 8)))
    result.clean = len(paths)
    for path in paths:
        if why := why_refused(path):
            result.false_alarms.append(f"{path.parent.name}/{path.name}: {why}")
    for job in sorted({path.parent for path in paths}):
        code = verify_command(job)
        result.commands += 1
        if code != 0:
            result.false_alarms.append(f"{job.name}: the command left with {code}")


def ask_peer(peer: Peer, seed: int, count: int, top: Path) -> Column | None:
    """Outcomes of ``count`` faults of each kind; None if the peer is not installed."""
    try:
        peer.prepare()
    except ImportError:
        return None
    root = top / peer.name
    root.mkdir()
    saved = build(peer, root, seed, STEPS)
    faults = [(kind, f"{seed}/{peer.name}/{kind}/{i}") for kind in KINDS for i in range(count)]
    column: Column = {kind: Cell() for kind in KINDS}
    for (kind, _), (outcome, _, _) in zip(
        faults, observe(peer, saved, faults, damage), strict=True
    ):
        column[kind].outcomes[outcome] += 1
    return column


# -- output --------------------------------------------------------------------------------------


def rows(result: Result) -> list[list[str]]:
    """The table with its head and its total."""
    table = [["fault", *result.columns]]
    for kind in KINDS:
        cells = [str(column[kind]) if column else "-" for column in result.columns.values()]
        table.append([kind, *cells])
    totals = []
    for column in result.columns.values():
        total = Cell()
        for cell in (column or {}).values():
            total.outcomes += cell.outcomes
        totals.append(f"{total} of {total.count}" if column else "not installed")
    return [*table, ["all", *totals]]


def print_markdown(table: list[list[str]]) -> None:
    """For the docs."""
    head, *body = table
    for row in [head, ["---", *["---:"] * (len(head) - 1)], *body]:
        print("| " + " | ".join(row) + " |")


def print_rich(table: list[list[str]]) -> None:
    """For a terminal."""
    from rich.console import Console
    from rich.table import Table

    head, *body = table
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for index, title in enumerate(head):
        shown.add_column(title, justify="right" if index else "left", no_wrap=True)
    for row in body:
        shown.add_row(*row, style="bold" if row is body[-1] else "")
    console = Console()
    Console(width=max(console.width, 130)).print(shown)


def versions() -> dict[str, str]:
    """Of what was measured, and on what."""
    found = {"elastic-ckpt": elastic_ckpt.__version__, "python": platform.python_version()}
    for name in ("torch", "safetensors", "colossalai"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"cores": str(os.cpu_count())}


def as_json(result: Result, about: dict[str, Any]) -> str:
    """All counts."""
    columns = {
        name: column and {kind: dict(cell.outcomes) for kind, cell in column.items()}
        for name, column in result.columns.items()
    }
    return json.dumps(
        about
        | {
            "table": rows(result),
            "outcomes": columns,
            "missed": result.missed,
            "clean": result.clean,
            "false_alarms": result.false_alarms,
            "commands": result.commands,
        }
    )


def measure(args: argparse.Namespace, top: Path) -> Result:
    """All that the arguments ask for."""
    result = Result()
    if args.only is not None:
        count_missed(result, args.seed, [args.only], args.commands, top)
        return result
    count_missed(result, args.seed, range(args.faults), args.commands, top)
    count_false_alarms(result, args.seed, args.clean, top)
    for peer in PEERS if args.peers else ():
        if peer.name in args.skip:
            continue
        result.columns[peer.name] = ask_peer(peer, args.seed, args.peer_faults, top)
    return result


def main() -> int:
    """Print the table; 1 if a fault was missed or a clean checkpoint refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=2000, help="in all, over the kinds")
    parser.add_argument("--clean", type=int, default=200)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--skip", action="append", default=[], metavar="PEER", help="leave out")
    parser.add_argument("--commands", type=int, default=20, help="faults for the real command")
    parser.add_argument("--peer-faults", type=int, default=60, help="per kind and peer")
    parser.add_argument("--only", type=int, metavar="N", help="replay fault N of this seed")
    parser.add_argument("--dir", help="where to work, instead of the system's place")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_objects(0)  # imports much of torch, which every child would else do for itself
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="corruption-", dir=args.dir) as top:
        result = measure(args, Path(top).resolve())
    seconds = round(time.monotonic() - began, 1)
    about = {"seed": args.seed, "seconds": seconds, "versions": versions()}
    if args.json:
        print(as_json(result, about))
    else:
        _report(result, about, print_markdown if args.markdown else print_rich)
    return 1 if result.missed or result.false_alarms else 0


def _report(
    result: Result, about: dict[str, Any], print_table: Callable[[list[list[str]]], None]
) -> None:
    print_table(rows(result))
    column = result.columns["elastic-ckpt"] or {}
    faults = sum(cell.count for cell in column.values())
    peers = {name: column for name, column in result.columns.items() if name != "elastic-ckpt"}
    crashed = sum(c.outcomes["crashed"] for col in peers.values() for c in (col or {}).values())
    print(
        f"\nseed {about['seed']}: {faults - len(result.missed)} of {faults} faults found, "
        f"{len(result.false_alarms)} false alarms in {result.clean} clean checkpoints; "
        f"{result.commands} times by the command; peers crashed {crashed} times"
    )
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()), end="")
    print(f"; {about['seconds']} s")
    for line in result.missed:
        print(f"MISSED {line} (replay: --seed {about['seed']} --only {line.split()[0][1:]})")
    for line in result.false_alarms:
        print(f"FALSE ALARM {line}")


if __name__ == "__main__":
    sys.exit(main())

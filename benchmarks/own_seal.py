"""What sealing a checkpoint of the script's own costs, and whether training waits for it.

A directory of safetensors files is written, as a trainer would, and sealed by the keeper that the
supervisor runs. Beside it, in turns: one read of the same bytes. Then a loop of matrix products
runs in a process of its own, alone and while this process seals.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from harness import Options, Places, Report, goal, places, ratios, read_options, summary
from safetensors.torch import save_file

from elastic_ckpt.checkpoint.own.keeper import OwnKeeper
from elastic_ckpt.checkpoint.own.reports import Reports
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.own_saves import CompleteWhen, OwnSaves
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.util.progress import unwatched

FILES = 3
CHUNK_BYTES = 2 * 1024 * 1024
MARKER = "trainer_state.json"


def write(place: Path, megabytes: float) -> None:
    """Write a checkpoint of random values, durably: neither contestant pays for its writing."""
    place.mkdir(parents=True)
    count = int(megabytes * 1e6 / FILES / 4)
    for number in range(FILES):
        save_file({"weights": torch.randn(count)}, place / f"model-{number}.safetensors")
    (place / MARKER).write_text("{}")
    for path in place.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def keeper(where: Path) -> OwnKeeper:
    """A keeper as the supervisor has one."""
    job = JobDirectory(where / "job")
    job.prepare()
    rules = OwnSaves((str(where / "checkpoint-*"),), CompleteWhen(MARKER))
    reports = Reports(lambda _: None, lambda *_: None, unwatched, lambda _: None)
    return OwnKeeper(job, rules, where, 1, Retention(), reports)


def read_once(place: Path) -> float:
    """Seconds of one read of every byte."""
    began = time.perf_counter()
    buffer = bytearray(CHUNK_BYTES)
    for path in sorted(place.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def seal_once(where: Path) -> float:
    """Seconds of processor-bound or disk-bound work in the look that seals."""
    found = keeper(where)
    found.look(0.0)
    began = time.perf_counter()
    found.look(2.0)
    took = time.perf_counter() - began
    assert found.newest is not None
    return took


def train(link: Connection) -> None:
    """Send the seconds of each step until killed."""
    torch.set_num_threads(1)
    weights = torch.randn(384, 384)
    while True:
        began = time.perf_counter()
        for _ in range(4):
            weights = torch.tanh(weights @ weights)
        link.send(time.perf_counter() - began)


def steps_during(link: Connection, work: float, where: Path | None) -> list[float]:
    """Steps within ``work`` seconds, or while a checkpoint is sealed again and again."""
    while link.poll():
        link.recv()
    found, ends = [], time.monotonic() + work
    while time.monotonic() < ends:
        if where is not None:
            seal_once(where)
            for path in (where / "job/.elastic-ckpt/own").glob("0*.json"):
                path.unlink()
        else:
            time.sleep(0.05)
        while link.poll():
            found.append(link.recv())
    return found


def measure(options: Options, where: Places) -> dict[str, list[float]]:
    """Seconds of both contestants, in turns, and of steps alone and beside a seal."""
    found: dict[str, list[float]] = {"read": [], "seal": [], "alone": [], "beside": []}
    root = where.disk / "own"
    write(root / "checkpoint-1", options.megabytes)
    for turn in range(options.repeats + 1):
        values = {"read": read_once(root / "checkpoint-1"), "seal": seal_once(root)}
        for path in (root / "job/.elastic-ckpt/own").glob("0*.json"):
            path.unlink()
        if turn:
            for name, value in values.items():
                found[name].append(value)
    here, there = multiprocessing.Pipe()
    trainer = multiprocessing.get_context("spawn").Process(target=train, args=(there,))
    trainer.start()
    seconds = 0.5 if options.quick else 5.0
    here.recv()  # it has started
    for turn in range(options.repeats + 1):
        for name, place in (("alone", None), ("beside", root)):
            steps = steps_during(here, seconds, place)
            if turn and steps:
                found[name].append(statistics.median(steps))
    trainer.kill()
    trainer.join(30)
    return found


def main() -> None:
    """Print the table."""
    options = read_options(__doc__)
    with places(options.directory) as where:
        found = measure(options, where)
    report = Report("own_seal", "Sealing what the script wrote", {"megabytes": options.megabytes})
    shown = {
        "read": "one read of its bytes", "seal": "seal",
        "alone": "step of a loop alone", "beside": "step beside a seal",
    }  # fmt: skip
    for name, what in shown.items():
        report.rows.append(summary(what, [1e3 * one for one in found[name]], unit="ms"))
    report.goals.append(goal("seal / one read", ratios(found["seal"], found["read"]), 1.15))
    report.goals.append(goal("step beside / alone", ratios(found["beside"], found["alone"]), 1.1))
    report.show(options)


if __name__ == "__main__":
    main()

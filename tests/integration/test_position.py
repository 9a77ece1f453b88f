"""The position in a checkpoint is what the optimizer has consumed, however the script loops.

Each loop runs calm once, then is cut off after some batches and run again: what the second run
ends with must be the calm run's, bit for bit, so no sample was lost or used twice.
"""

import hashlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from elastic_ckpt import (
    ElasticSampler,
    Session,
    StatefulDistributedSampler,
    load_checkpoint,
    save_checkpoint,
    should_save,
)
from elastic_ckpt.checkpoint.catalog import scan
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.policy.interval import OptimalInterval
from elastic_ckpt.training import auto_interval
from tests.integration.test_session import checkpoints, newest, run

pytestmark = pytest.mark.one_torch

SAMPLES, BATCH = 96, 4


class Cut(Exception):
    """The machine goes away."""


class Counter:
    """State of the script's own, for ``extra``."""

    count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Script:
    """One run: a model with dropout, its optimizers, and batches that are counted.

    Args:
        cut: raise after this many batches; 0 for never.
        notice: send SIGTERM within this batch.
    """

    def __init__(self, directory: str, cut: int = 0, notice: int = 0, **options: Any) -> None:
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.directory, self.cut, self.notice, self.options = directory, cut, notice, options
        self.batches_used = 0
        self.counter = Counter()

    def open(self, interval: int = 6, **options: Any) -> Session:
        arguments = {"model": self.model, "optimizer": self.optimizer, "save_interval": interval}
        self.session = Session(self.directory, **arguments | options)
        return self.session

    def loader(self) -> DataLoader:
        numbers = torch.arange(SAMPLES, dtype=torch.float32)
        data = TensorDataset(torch.stack([numbers % 7, numbers % 3], 1), numbers[:, None] % 5)
        return DataLoader(data, batch_size=BATCH, sampler=ElasticSampler(data, seed=0))

    def loss(self, batch: Any) -> torch.Tensor:
        if self.cut and self.batches_used == self.cut:
            raise Cut
        self.batches_used += 1
        if self.batches_used == self.notice:
            os.kill(os.getpid(), signal.SIGTERM)
            steps = self.session._runtime.steps
            while not steps.requested:
                pass
        inputs, targets = batch
        return (self.model(inputs) - targets).pow(2).mean()

    def digest(self) -> str:
        found = hashlib.sha256(str(self.counter.count).encode())
        for value in self.model.state_dict().values():
            found.update(value.numpy().tobytes())
        return found.hexdigest()


def ahead(batches: Iterator[Any], depth: int = 1) -> Iterator[Any]:
    """Yield each batch after the ones behind it were requested, as NVIDIA's prefetcher does."""
    kept: list[Any] = []
    for batch in batches:
        kept.append(batch)
        if len(kept) > depth:
            yield kept.pop(0)
    yield from kept


def simple(script: Script, order: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> None:
    with script.open() as session:
        for _ in session.epochs(2):
            for batch in order(session.batches(script.loader())):
                script.optimizer.zero_grad()
                script.loss(batch).backward()
                script.optimizer.step()


def look_ahead(script: Script) -> None:
    simple(script, ahead)


def look_far_ahead(script: Script) -> None:
    simple(script, lambda batches: ahead(batches, 3))


def fetch_between(script: Script) -> None:
    """Request the next batch between the backward pass and the optimizer's step."""
    script.model[1].p = 0.0  # its random numbers would be drawn before the save
    with script.open() as session:
        for _ in session.epochs(2):
            batches = iter(session.batches(script.loader()))
            batch = next(batches, None)
            while batch is not None:
                script.loss(batch).backward()
                batch = next(batches, None)
                script.optimizer.step()
                script.optimizer.zero_grad()


def accumulate(script: Script, order: Callable[[Iterator[Any]], Iterator[Any]] = iter) -> None:
    """Accumulate four batches, which the Session was not told."""
    with script.open() as session:
        for _ in session.epochs(2):
            for index, batch in enumerate(order(session.batches(script.loader())), 1):
                (script.loss(batch) / 4).backward()
                if index % 4 == 0:
                    script.optimizer.step()
                    script.optimizer.zero_grad()


def accumulate_ahead(script: Script) -> None:
    accumulate(script, ahead)


def overflow(script: Script) -> None:
    """A scaler that skips the optimizer's step now and then, also the very first."""
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    with script.open(extra={"scaler": scaler}) as session:
        for _ in session.epochs(2):
            for batch in session.batches(script.loader()):
                loss = script.loss(batch)
                is_bad = session.step in (0, 5, 6, 11, 17, 18)
                scaler.scale(loss * float("inf") if is_bad else loss).backward()
                scaler.step(script.optimizer)
                scaler.update()
                script.optimizer.zero_grad()


def skip(script: Script) -> None:
    """Skip more batches in a row than a save waits for, as after a bad loss; count them all."""
    with script.open(extra={"counter": script.counter}) as session:
        for _ in session.epochs(2):
            for batch in session.batches(script.loader()):
                script.optimizer.zero_grad()
                loss = script.loss(batch)
                script.counter.count += 1
                if session.step % 24 in range(7, 22):
                    continue
                loss.backward()
                script.optimizer.step()


def same_loader(script: Script) -> None:
    """Validate with the loader that is being read, within the epoch and behind it."""
    loader = script.loader()
    with script.open() as session:
        for _ in session.epochs(2):
            for index, batch in enumerate(session.batches(loader)):
                script.optimizer.zero_grad()
                script.loss(batch).backward()
                script.optimizer.step()
                if index % 5 == 0:
                    with session.evaluation():
                        assert sum(len(inputs) for inputs, _ in loader) == SAMPLES
            with session.evaluation():
                assert sum(len(inputs) for inputs, _ in loader) == SAMPLES


def several(script: Script) -> None:
    """One optimizer steps with each batch; another accumulates four."""
    first, last = script.model[0], script.model[2]
    script.optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    slow = torch.optim.SGD(last.parameters(), lr=1e-2, momentum=0.9)
    with script.open(extra={"slow": slow}) as session:
        for _ in session.epochs(2):
            for index, batch in enumerate(session.batches(script.loader()), 1):
                script.loss(batch).backward()
                script.optimizer.step()
                script.optimizer.zero_grad()
                if index % 4 == 0:
                    slow.step()
                    slow.zero_grad()


def in_turns(script: Script) -> None:
    """Two optimizers take turns, and never step with the same batch."""
    first, last = script.model[0], script.model[2]
    script.optimizer = torch.optim.AdamW(first.parameters(), lr=1e-2)
    other = torch.optim.AdamW(last.parameters(), lr=1e-2)
    with script.open(extra={"other": other}) as session:
        for _ in session.epochs(2):
            for batch in session.batches(script.loader()):
                script.model.zero_grad()
                script.loss(batch).backward()
                (script.optimizer, other)[session.step % 2].step()


def twice(script: Script) -> None:
    with script.open() as session:
        for _ in session.epochs(2):
            for batch in ahead(session.batches(script.loader())):
                used = script.batches_used
                for _ in range(2):
                    script.batches_used = used
                    script.optimizer.zero_grad()
                    script.loss(batch).backward()
                    script.optimizer.step()


def closures(script: Script) -> None:
    script.optimizer = torch.optim.LBFGS(script.model.parameters(), lr=0.1, max_iter=3)
    with script.open() as session:
        for _ in session.epochs(2):
            for batch in session.batches(script.loader()):
                used = script.batches_used

                def closure(batch: Any = batch, used: int = used) -> torch.Tensor:
                    script.batches_used = used
                    script.optimizer.zero_grad()
                    loss = script.loss(batch)
                    loss.backward()
                    return loss

                script.optimizer.step(closure)


def scheduled(script: Script) -> None:
    """Step a schedule with each step of the optimizer, while looking ahead."""
    schedule = torch.optim.lr_scheduler.StepLR(script.optimizer, 5, gamma=0.5)
    with script.open(lr_scheduler=schedule) as session:
        for _ in session.epochs(2):
            for batch in ahead(session.batches(script.loader())):
                script.optimizer.zero_grad()
                script.loss(batch).backward()
                script.optimizer.step()
                schedule.step()


def unhooked(script: Script) -> None:
    """The state changes without the optimizer's step, as in a CUDA graph that is replayed."""
    with script.open() as session:
        for _ in session.epochs(2):
            for batch in session.batches(script.loader()):
                script.optimizer.zero_grad()
                script.loss(batch).backward()
                with torch.no_grad():
                    for parameter in script.model.parameters():
                        parameter -= 0.01 * parameter.grad


LOOPS = [
    simple, look_ahead, look_far_ahead, fetch_between, accumulate, accumulate_ahead, overflow,
    skip, same_loader, several, in_turns, twice, closures, scheduled, unhooked,
]  # fmt: skip


def run_loop(loop: Callable[[Script], None], directory: str, cut: int, notice: int) -> Any:
    script = Script(directory, cut, notice)
    try:
        loop(script)
    except Cut:
        return "cut"
    return script.digest()


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_run_that_was_cut_off_ends_as_the_calm_one(tmp_path: Path, loop: Any) -> None:
    calm = run(run_loop, loop, str(tmp_path / "calm"), 0, 0)
    assert isinstance(calm, str), calm
    for cut in (12, 33):
        directory = tmp_path / str(cut)
        assert run(run_loop, loop, str(directory), cut, 0) == "cut"
        assert checkpoints(directory), "it was cut off before the first save"
        assert run(run_loop, loop, str(directory), 0, 0) == calm, cut


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_a_run_that_had_a_notice_ends_as_the_calm_one(tmp_path: Path, loop: Any) -> None:
    calm = run(run_loop, loop, str(tmp_path / "calm"), 0, 0)
    for notice in (8, 27):
        directory = tmp_path / str(notice)
        assert run(run_loop, loop, str(directory), 0, notice) == 75
        assert newest(directory).step < 48
        assert run(run_loop, loop, str(directory), 0, 0) == calm, notice


def own_loop(directory: str, cut: int) -> Any:
    """A loop of its own that calls should_save with each batch, and accumulates four."""
    torch.manual_seed(1)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    _, step, _ = load_checkpoint(directory, None, model, optimizer, None)
    first = step
    data = Script(directory).loader().dataset
    sampler = StatefulDistributedSampler(data)
    for inputs, targets in DataLoader(data, batch_size=BATCH, sampler=sampler):
        step += 1
        (model(inputs) - targets).pow(2).mean().backward()
        if step % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
        if should_save(step, every=3):
            save_checkpoint(directory, None, model, optimizer, None, 0, step, BATCH)
        if cut and step == cut:
            return "cut"
    return first, model.weight.tolist()


def test_should_save_waits_for_an_optimizer_step(tmp_path: Path) -> None:
    for name in ("calm", "cut"):
        (tmp_path / name).mkdir()
    _, calm = run(own_loop, str(tmp_path / "calm"), 0)
    assert run(own_loop, str(tmp_path / "cut"), 11) == "cut"
    assert newest(tmp_path / "cut").step == 8
    assert run(own_loop, str(tmp_path / "cut"), 0) == (8, calm)


def automatic_loop(directory: str, every: int | None) -> bool:
    """A loop of its own that says nothing of an interval."""
    auto_interval.FIRST_INTERVAL = OptimalInterval(0.001, "at once")  # type: ignore[misc]
    model = nn.Linear(2, 1)
    load_checkpoint(directory, None, model, None, None)
    for step in range(1, 30):
        time.sleep(0.002)
        if should_save(step, every=every):
            save_checkpoint(directory, None, model, None, None, 0, step, BATCH)
            break
    save_checkpoint(directory, None, model, None, None, 0, 40, BATCH)
    return step < 29


def test_should_save_has_the_automatic_interval(tmp_path: Path) -> None:
    """What the script saves at other steps is not automatic, and so is not pruned."""
    assert run(automatic_loop, str(tmp_path), None)
    manifests = [read_manifest(path) for path in scan(JobDirectory.at(tmp_path))]
    assert [one.automatic for one in manifests] == [False, True]
    assert manifests[0].step == 40 and manifests[1].reason == "interval"


def test_should_save_with_interval_zero_has_none(tmp_path: Path) -> None:
    assert not run(automatic_loop, str(tmp_path), 0)


def hooks_of(directory: str) -> tuple[bool, bool]:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def found() -> bool:
        pre, post = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
        first = next(model.parameters())._post_accumulate_grad_hooks
        return bool(pre or post or first)

    with Session(directory, model=model, optimizer=optimizer):
        during = found()
    return during, found()


def test_finished_session_leaves_no_hooks(tmp_path: Path) -> None:
    assert run(hooks_of, str(tmp_path)) == (True, False)

"""A session resumes bit for bit from every point where it can be stopped."""

import contextlib
import hashlib
import io
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from elastic_ckpt import ElasticSampler, Session
from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key
from tests.integration.ranks import run_ranks, server
from tests.marks import slow


def run(function, *args: Any, seconds: float = 60.0) -> Any:
    """``function(*args)`` in a process of its own, which forks from one that has torch loaded.

    Returns:
        What it returned; its exit code, if it left by SystemExit; (type name, text) of what it
        raised.
    """
    context = server()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=enter, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise AssertionError(f"{function.__name__} returned nothing within {seconds} s")
        result = receiver.recv()
        process.join(10)
        return result
    finally:
        process.kill()
        process.join(10)
        receiver.close()


def enter(sender, function, args) -> None:
    os.environ.pop("ELASTIC_CKPT_DIR", None)
    multiprocessing.set_start_method("fork", force=True)  # for a DataLoader's workers
    torch.set_num_threads(1)
    try:
        result = function(*args)
    except SystemExit as leaving:
        result = leaving.code
    except Exception as error:
        result = (type(error).__name__, str(error))
    sender.send(result)


# -- the job ------------------------------------------------------------------------------------


class Numbers(Dataset):
    """Samples with their index; on request with noise from the global generators."""

    def __init__(self, size: int, augmented: bool = False, seed: int = 11):
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(size, 4, generator=generator)
        self.augmented = augmented

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        if self.augmented:
            noise = torch.rand(4) + random.random() + np.random.rand()
            return index, self.inputs[index] + noise.float()
        return index, self.inputs[index]


class Average:
    """An exponential moving average of the parameters."""

    def __init__(self, model):
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.updates = 0

    def update(self, model):
        self.updates += 1
        for name, parameter in model.named_parameters():
            self.shadow[name].lerp_(parameter.detach(), 0.1)

    def state_dict(self):
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state):
        self.shadow, self.updates = dict(state["shadow"]), state["updates"]


@dataclass(frozen=True)
class Plan:
    """One run of the script.

    Attributes:
        notice: (step, place): a SIGTERM while that step, or the evaluation after it, is under
            way; it continues only when the notice has arrived.
        leave: (step, place): the script ends its loops by ``break`` after or before that step's
            call of the optimizer, or in the middle of its micro-batches.
        fail: (step, exception's name): raised within that step.
    """

    directory: str
    size: int = 18
    batch: int = 4
    accumulation: int = 1
    workers: int = 0
    drop_last: bool = False
    epochs: int = 2
    interval: int = 0
    augmented: bool = False
    seed: int = 5
    data_seed: int = 11
    extra: tuple[str, ...] = ()
    notice: tuple[int, str] | None = None
    leave: tuple[int, str] | None = None
    fail: tuple[int, str] | None = None

    @property
    def steps_per_epoch(self) -> int:
        if self.drop_last:
            return self.size // self.batch // self.accumulation
        return math.ceil(math.ceil(self.size / self.batch) / self.accumulation)


def give_notice(session) -> None:
    """Send SIGTERM and wait until the session has noticed it."""

    def ticks():
        limit = time.monotonic() + 20
        while time.monotonic() < limit:
            yield
            time.sleep(0.002)

    os.kill(os.getpid(), signal.SIGTERM)
    with session.evaluation(interruptible=True) as evaluation:
        for _ in evaluation.batches(ticks()):
            pass
    assert evaluation.interrupted


def train(plan: Plan) -> dict:
    """The script: what it used, what it did, and where it ended."""
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 1))
    bare = model
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)
    data = Numbers(plan.size, plan.augmented, plan.data_seed)
    loader = DataLoader(
        data,
        batch_size=plan.batch,
        sampler=ElasticSampler(data, seed=plan.seed, drop_last=plan.drop_last),
        num_workers=plan.workers,
        drop_last=plan.drop_last,
    )
    average = Average(bare)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    things = {"average": average, "scaler": scaler, "late": Average(bare)}
    used: list[tuple[int, int, list[int]]] = []
    worked: list[int] = []
    left = False
    with Session(
        plan.directory,
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        accumulation_steps=plan.accumulation,
        save_interval=plan.interval,
        extra={name: things[name] for name in plan.extra},
    ) as session:
        resumed = session.resumed_from.name if session.resumed_from else None
        for epoch in session.epochs(plan.epochs):
            group: list[int] = []
            for index, inputs in session.batches(loader):
                step = session.step + 1
                group += index.tolist()
                noise = (random.random() + np.random.rand()) * 1e-2
                loss = (model(inputs) * (1 + noise)).pow(2).mean()
                scaler.scale(loss / plan.accumulation).backward()
                if plan.notice == (step, "step"):
                    give_notice(session)
                if plan.fail and plan.fail[0] == step:
                    raise {"ValueError": ValueError, "SystemExit": SystemExit}[plan.fail[1]](3)
                place = "before" if session.step_ends else "middle"
                if plan.leave == (step, place) and (place == "before" or len(group) > plan.batch):
                    left = True
                    break
                if session.step_ends:
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                    average.update(bare)
                    used.append((step, epoch, group))
                    group = []
                    if plan.leave == (step, "after"):
                        left = True
                        break
            if left:
                break
            with session.evaluation():
                bare.train()
                bare(data.inputs)
                random.random()
                np.random.rand()
                if plan.notice == (session.step, "evaluation"):
                    give_notice(session)
            scheduler.step()
            worked.append(epoch)
        place = session.epoch, session.step
    digest = hashlib.sha256()
    for value in bare.state_dict().values():
        digest.update(value.numpy().tobytes())
    for state in optimizer.state_dict()["state"].values():
        digest.update(state["exp_avg_sq"].numpy().tobytes() + state["step"].numpy().tobytes())
    digest.update(repr(scheduler.get_last_lr()).encode())
    return {
        "digest": digest.hexdigest(),
        "draws": (random.random(), float(np.random.rand()), torch.rand(1).item()),
        "average": [average.updates, *(v.tolist() for v in average.shadow.values())],
        "scaler": scaler.state_dict(),
        "used": used,
        "worked": worked,
        "place": place,
        "resumed": resumed,
    }


def train_on_rank(rank: int, plan: Plan) -> dict:
    torch.set_num_threads(1)
    return train(plan)


def checkpoints(directory) -> list[Path]:
    """Sealed ones, oldest first."""
    return sorted(Path(directory).glob("epoch-*"), key=lambda path: checkpoint_key(path.name))


def newest(directory):
    found = newest_intact(JobDirectory.at(Path(directory)))
    assert found is not None
    return found.manifest


def assert_same_end(result, calm) -> None:
    assert isinstance(result, dict), result
    for name in ("digest", "draws", "place"):
        assert result[name] == calm[name], name
    later = [step for step in calm["used"] if step[0] > calm["place"][1] - len(result["used"])]
    assert result["used"] == later


# -- bit for bit, from everywhere ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("workers", "accumulation", "drop_last"),
    [
        (0, 3, True),
        (2, 1, False),
        *(slow(0, *rest) for rest in ((1, False), (1, True), (3, False))),
        *(slow(2, *rest) for rest in ((1, True), (3, False), (3, True))),
    ],
)
def test_resume_from_every_checkpoint_is_exact(tmp_path, workers, accumulation, drop_last):
    plan = Plan(
        str(tmp_path / "calm"),
        accumulation=accumulation,
        workers=workers,
        drop_last=drop_last,
        augmented=workers == 0,
    )
    calm = run(train, plan)
    saving = run(train, replace(plan, directory=str(tmp_path / "saving"), interval=1))
    assert saving == calm  # to save disturbs nothing
    per_epoch = plan.steps_per_epoch
    total = plan.epochs * per_epoch
    assert calm["place"] == (plan.epochs, total)
    names = [f"epoch-{(step - 1) // per_epoch}_step-{step}" for step in range(1, total + 1)]
    found = checkpoints(tmp_path / "saving")
    assert [path.name for path in found] == [*names, f"epoch-{plan.epochs}_step-{total}"]
    for count, path in enumerate(found, start=1):
        copy = tmp_path / f"from-{count}"
        shutil.copytree(tmp_path / "saving", copy)
        for newer in checkpoints(copy)[count:]:
            shutil.rmtree(newer)
        result = run(train, replace(plan, directory=str(copy)))
        assert_same_end(result, calm)
        assert result["resumed"] == path.name
        assert len(result["used"]) == max(0, total - count)
        epoch = checkpoint_key(path.name)[0]
        assert result["worked"] == list(range(epoch, plan.epochs))  # the epoch's end, once


@pytest.mark.parametrize(
    ("accumulation", "workers", "place"),
    [
        (3, 0, "step"),
        (1, 0, "evaluation"),
        (1, 2, "step"),
        *(slow(*case) for case in ((1, 0, "step"), (3, 0, "evaluation"), (1, 2, "evaluation"))),
    ],
)
def test_resume_after_a_notice_at_every_step_is_exact(tmp_path, place, accumulation, workers):
    plan = Plan(
        str(tmp_path / "calm"), accumulation=accumulation, workers=workers, augmented=workers == 0
    )
    calm = run(train, plan)
    per_epoch = plan.steps_per_epoch
    total = plan.epochs * per_epoch
    # With workers the batch is in hand before the step begins; one place of each kind is enough.
    steps = range(1, total - 1) if workers == 0 else (1, per_epoch)
    for step in steps:
        if place == "evaluation" and step % per_epoch:
            continue
        noticed = replace(plan, directory=str(tmp_path / f"{step}"), notice=(step, place))
        assert run(train, noticed) == 75
        manifest = newest(noticed.directory)
        # The next step may have started before the answer came: then that step counts.
        assert manifest.step in (step, step + 1)
        # After the last step of an epoch, the script's work at the end of the epoch is done.
        assert (manifest.epoch, manifest.step_in_epoch) == divmod(manifest.step, per_epoch)
        assert manifest.reason == "emergency"
        result = run(train, replace(noticed, notice=None))
        assert_same_end(result, calm)
        assert result["worked"] == list(range(manifest.epoch, plan.epochs))


def test_resume_after_a_notice_in_every_run_is_exact(tmp_path):
    plan = Plan(str(tmp_path / "calm"), augmented=True)
    calm = run(train, plan)
    plan = replace(plan, directory=str(tmp_path / "job"))
    total = plan.epochs * plan.steps_per_epoch
    stops = [0]
    while stops[-1] < total - 2:
        assert run(train, replace(plan, notice=(stops[-1] + 1, "step"))) == 75
        stops.append(newest(plan.directory).step)
        assert stops[-1] > stops[-2]
    assert len(checkpoints(plan.directory)) == len(stops) - 1
    assert_same_end(run(train, plan), calm)


def test_notice_after_the_last_step_still_finishes_the_job(tmp_path):
    plan = Plan(str(tmp_path / "calm"))
    total = plan.epochs * plan.steps_per_epoch
    calm = run(train, plan)
    for place in ("step", "evaluation"):
        noticed = replace(plan, directory=str(tmp_path / place), notice=(total, place))
        assert run(train, noticed) == calm
        assert newest(noticed.directory).reason == "final"


# -- the end of an epoch, the end of the job ----------------------------------------------------


def test_unsaved_end_of_an_epoch_is_repeated_once(tmp_path):
    """The process dies after the end of the epoch; the checkpoint is that of its last step."""
    plan = Plan(str(tmp_path / "calm"), augmented=True)
    calm = run(train, plan)
    last = plan.steps_per_epoch
    died = replace(
        plan, directory=str(tmp_path / "job"), interval=last, fail=(last + 1, "ValueError")
    )
    assert run(train, died) == ("ValueError", "3")
    assert [path.name for path in checkpoints(died.directory)] == [f"epoch-0_step-{last}"]
    result = run(train, replace(died, fail=None))
    assert_same_end(result, calm)
    assert result["worked"] == [0, 1]
    assert result["used"][0][1] == 1  # no batch of epoch 0 was left


def test_finished_job_does_not_train_again(tmp_path):
    plan = Plan(str(tmp_path), interval=4)
    first = run(train, plan)
    total = plan.epochs * plan.steps_per_epoch
    manifest = newest(tmp_path)
    assert (manifest.reason, manifest.epoch, manifest.step) == ("final", plan.epochs, total)
    assert (manifest.sample_start_index, manifest.step_in_epoch) == (0, 0)
    before = [(path.name, path.stat().st_ino) for path in checkpoints(tmp_path)]
    second = run(train, plan)
    assert (second["used"], second["worked"], second["place"]) == ([], [], (plan.epochs, total))
    assert second["digest"] == first["digest"]
    assert [(path.name, path.stat().st_ino) for path in checkpoints(tmp_path)] == before


def test_finished_job_with_more_epochs_resumes_exactly(tmp_path):
    plan = Plan(str(tmp_path / "calm"), epochs=3, augmented=True)
    calm = run(train, plan)
    plan = replace(plan, directory=str(tmp_path / "job"))
    for epochs in (1, 2, 3):
        result = run(train, replace(plan, epochs=epochs))
        assert result["worked"] == [epochs - 1]
    assert_same_end(result, calm)


def test_running_states_count_within_the_epoch(tmp_path):
    plan = Plan(str(tmp_path), accumulation=2, interval=1)
    run(train, plan)
    places = []
    for path in checkpoints(tmp_path):
        states = json.loads((path / "running_states.json").read_text())
        manifest = read_manifest(path)
        assert manifest.samples_per_step == 8
        assert manifest.sample_start_index == states["sample_start_index"]  # one rank
        assert (manifest.epoch, manifest.step_in_epoch) == (states["epoch"], states["step"])
        places.append((states["epoch"], states["step"], states["sample_start_index"]))
    assert places == [(0, 1, 8), (0, 2, 16), (0, 3, 18), (1, 1, 8), (1, 2, 16), (1, 3, 18),
                      (2, 0, 0)]  # fmt: skip


@pytest.mark.parametrize("name", ["ValueError", "SystemExit"])
def test_exception_saves_nothing(tmp_path, name):
    plan = Plan(str(tmp_path), fail=(3, name))
    assert run(train, plan) == (("ValueError", "3") if name == "ValueError" else 3)
    assert checkpoints(tmp_path) == []
    assert list((tmp_path / ".attempts").iterdir()) == []


# -- break --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [slow(1), 3])
def test_break_after_an_optimizer_step_counts_it(tmp_path, accumulation):
    plan = Plan(str(tmp_path / "calm"), accumulation=accumulation, augmented=True)
    calm = run(train, plan)
    per_epoch = plan.steps_per_epoch
    for step in range(1, plan.epochs * per_epoch + 1):
        left = replace(plan, directory=str(tmp_path / f"{step}"), leave=(step, "after"))
        result = run(train, left)
        epoch = (step - 1) // per_epoch
        assert result["place"] == (epoch, step)
        manifest = newest(left.directory)
        done = step - epoch * per_epoch
        assert (manifest.epoch, manifest.step, manifest.step_in_epoch) == (epoch, step, done)
        assert manifest.sample_start_index == min(done * accumulation * plan.batch, plan.size)
        assert_same_end(run(train, replace(left, leave=None)), calm)


@pytest.mark.parametrize(("place", "accumulation"), [("before", 1), ("before", 3), ("middle", 3)])
def test_break_before_the_optimizer_step_repeats_it(tmp_path, place, accumulation):
    """What the step had used of the epoch is used again: its gradients are gone."""
    plan = Plan(str(tmp_path), accumulation=accumulation, size=40, leave=(2, place))
    first = run(train, plan)
    assert first["place"] == (0, 1)
    manifest = newest(tmp_path)
    assert (manifest.step, manifest.sample_start_index) == (1, accumulation * plan.batch)
    second = run(train, replace(plan, leave=None))
    samples = [index for _, epoch, group in first["used"] + second["used"] if epoch == 0
               for index in group]  # fmt: skip
    assert sorted(samples) == list(range(plan.size))


def short_epochs(directory: str, interval: int, kept: bool) -> dict:
    """Three epochs that end by ``break`` after their second step."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = torch.arange(8.0).view(8, 1)
    loader = DataLoader(data, batch_size=2, sampler=ElasticSampler(data, shuffle=False))
    used: list[list[float]] = []
    places: list[tuple[int, int]] = []
    session = Session(directory, model=model, optimizer=optimizer, save_interval=interval)
    with session:
        for _ in session.epochs(3):
            batches = session.batches(loader)
            if not kept:
                batches = [batches]
            samples: list[float] = []
            for batch in batches if kept else batches.pop():
                samples += batch.flatten().tolist()
                model(batch).sum().backward()
                optimizer.step()
                if len(samples) == 4:
                    break
            used.append(samples)
            places.append((session.epoch, session.step))
    return {"used": used, "places": places, "step": session.step}


@pytest.mark.parametrize("kept", [False, True])
def test_epochs_that_end_by_break_are_counted(tmp_path, kept):
    """Also if the script keeps the iterator, which then ends later than the epoch."""
    result = run(short_epochs, str(tmp_path), 0, kept)
    assert result["used"] == [[0, 1, 2, 3]] * 3
    assert result["step"] == 6
    manifest = newest(tmp_path)
    assert (manifest.epoch, manifest.step, manifest.sample_start_index) == (3, 6, 0)
    if not kept:
        assert result["places"] == [(0, 2), (1, 4), (2, 6)]


def test_save_due_at_a_break_is_made_at_the_end_of_the_epoch(tmp_path):
    run(short_epochs, str(tmp_path), 2, False)
    found = [(path.name, read_manifest(path).reason) for path in checkpoints(tmp_path)]
    assert found == [
        ("epoch-1_step-2", "interval"),
        ("epoch-2_step-4", "interval"),
        ("epoch-3_step-6", "final"),
    ]


# -- extra objects ------------------------------------------------------------------------------


def test_extra_objects_are_saved_and_restored(tmp_path):
    plan = Plan(str(tmp_path / "calm"), extra=("average", "scaler"), epochs=2)
    calm = run(train, plan)
    assert calm["average"][0] == 10
    assert calm["scaler"]["scale"] > 64.0
    for step in (1, 5, 7):
        job = replace(plan, directory=str(tmp_path / f"{step}"), leave=(step, "after"))
        run(train, job)
        result = run(train, replace(job, leave=None))
        assert_same_end(result, calm)
        assert result["average"] == calm["average"]
        assert result["scaler"] == calm["scaler"]


def test_extra_object_missing_from_the_checkpoint_is_an_error(tmp_path):
    plan = Plan(str(tmp_path), extra=("average",), leave=(1, "after"))
    run(train, plan)
    kind, text = run(train, replace(plan, extra=("average", "late")))
    assert kind == "ElasticCkptError"
    assert "epoch-0_step-1 has no state for extra='late'" in text
    fewer = run(train, replace(plan, extra=(), leave=None))  # leaving one out is not an error
    assert fewer["resumed"] == "epoch-0_step-1"


class Odd:
    def state_dict(self):
        return {"deep": [1, {"inside": object()}]}

    def load_state_dict(self, state):
        raise AssertionError("it was never saved")


def save_odd(directory: str) -> None:
    with Session(directory, model=nn.Linear(1, 1), extra={"odd": Odd()}) as session:
        data = torch.ones(2, 1)
        for _ in session.epochs(1):
            for _ in session.batches(DataLoader(data, sampler=ElasticSampler(data))):
                pass


def test_extra_object_that_cannot_be_saved_is_an_error(tmp_path):
    kind, text = run(save_odd, str(tmp_path))
    assert kind == "UsageError"
    assert "the state at 'extra.odd.deep.1.inside' is a object" in text
    assert checkpoints(tmp_path) == []
    assert list((tmp_path / ".attempts").iterdir()) == []


def step_outside_of_batches(directory: str, steps: int) -> str:
    model, printed = nn.Linear(1, 1), io.StringIO()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        contextlib.redirect_stderr(printed),
        Session(directory, model=model, optimizer=optimizer) as session,
    ):
        for _ in session.epochs(2):
            for _ in range(steps):
                model(torch.ones(1, 1)).sum().backward()
                optimizer.step()
    return printed.getvalue()


def test_session_that_closes_without_a_step_says_what_it_did_not_see(tmp_path):
    said = run(step_outside_of_batches, str(tmp_path / "a"), 3)
    assert "the optimizer stepped 6 times in this Session, which has seen no step" in said
    assert "session.batches(loader)" in said
    assert "has seen no step" not in run(step_outside_of_batches, str(tmp_path / "b"), 0)


def what_is_said(plan: Plan) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        train(plan)
    return printed.getvalue()


@pytest.mark.parametrize(("workers", "step", "count"), [(1, 2, 1), (0, 2, 0), (1, 5, 0)])
def test_other_random_numbers_of_loader_workers_are_said(tmp_path, workers, step, count):
    """After a restart in the middle of an epoch; five steps are one."""
    plan = Plan(str(tmp_path), workers=workers, leave=(step, "after"))
    assert "draw other random numbers" not in run(what_is_said, plan)
    said = run(what_is_said, replace(plan, leave=None))
    assert said.count("the loader's workers draw other random numbers") == count


# -- the data are the checkpoint's --------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": 19}, "19 samples instead of 18"),
        ({"data_seed": 12}, "its samples differ"),
        ({"seed": 6}, "its order has seed 6 instead of 5"),
    ],
)
def test_other_data_or_order_is_rejected(tmp_path, change, why):
    plan = Plan(str(tmp_path), leave=(2, "after"))
    run(train, plan)
    kind, text = run(train, replace(plan, **change))
    assert kind == "DataMismatch"
    assert why in text
    assert [path.name for path in checkpoints(tmp_path)] == ["epoch-0_step-2"]


# -- misuse -------------------------------------------------------------------------------------


def misuse(directory: str, how: str) -> None:
    data = torch.ones(6, 1)
    model = nn.Linear(1, 1)
    sampler = ElasticSampler(data)
    loaders = {
        "twice": DataLoader(data, sampler=sampler),
        "no sampler": DataLoader(data),
        "no batch size": DataLoader(data, sampler=sampler, batch_size=None),
    }
    if how == "accumulation":
        Session(directory, model=model, accumulation_steps=0)
    if how == "interval":
        Session(directory, model=model, save_interval=-1)
    with Session(None if how == "nowhere" else directory, model=model) as session:
        for _ in session.epochs(1):
            if how == "position":
                session.batches(loaders["twice"], position="skip")
            for _ in session.batches(loaders[how]):
                pass
            for _ in session.batches(loaders[how]):
                pass


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("twice", "once per epoch"),
        ("no sampler", "ElasticSampler, not with a SequentialSampler"),
        ("no batch size", "needs a DataLoader with a batch_size"),
        ("accumulation", "accumulation_steps must be at least 1"),
        ("interval", "save_interval at least 0"),
        ("nowhere", "no directory to save to"),
        ("position", "position='skip' is for a loader without an ElasticSampler"),
    ],
)
def test_misuse_is_an_error(tmp_path, how, text):
    kind, message = run(misuse, str(tmp_path), how)
    assert kind == "UsageError"
    assert text in message
    assert checkpoints(tmp_path) == []


def step_with_each_batch(directory: str, whose: str, **given: int) -> int:
    """Accumulate two batches, but let one optimizer step with each."""
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    optimizers = {
        name: torch.optim.SGD(one.parameters(), lr=0.1)
        for name, one in (("model's", model), ("other", other))
    }
    data = torch.ones(8, 1)
    loader = DataLoader(data, batch_size=2, sampler=ElasticSampler(data))
    session = Session(
        directory, model=model, optimizer=optimizers["model's"],
        extra={"other": optimizers["other"]}, **given,
    )  # fmt: skip
    with session:
        for _ in session.epochs(1):
            for batch in session.batches(loader):
                other(model(batch)).sum().backward()
                for name, optimizer in optimizers.items():
                    if name == whose or session.step_ends:
                        optimizer.step()
    return session.step


@pytest.mark.parametrize(
    ("given", "why"),
    [({"accumulation_steps": 2}, "accumulation"), ({"global_batch": 4}, "global batch of 4")],
)
def test_a_script_that_steps_too_often_is_refused(tmp_path, given, why):
    kind, text = run(partial(step_with_each_batch, **given), str(tmp_path / "a"), "model's")
    assert kind == "UsageError"
    assert f"stepped with batch 1 of the 2 that make a step by the {why}: step it only" in text
    assert checkpoints(tmp_path / "a") == []
    assert run(partial(step_with_each_batch, **given), str(tmp_path / "b"), "other") == 2


# -- evaluation ---------------------------------------------------------------------------------


def evaluate(directory: str) -> list:
    def draw():
        return random.random(), float(np.random.randn()), torch.randn(2).tolist()

    with Session(directory, model=nn.Linear(1, 1)) as session:
        draw()
        draws = []
        for leave in ("normally", "by an exception", "early"):
            before = random.getstate(), np.random.get_state(), torch.get_rng_state()
            expected = draw()
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])
            with contextlib.suppress(ZeroDivisionError):
                with session.evaluation(interruptible=True) as evaluation:
                    for index in evaluation.batches(range(5)):
                        torch.manual_seed(index)
                        draw()
                        if leave == "by an exception":
                            raise ZeroDivisionError
                        if leave == "early":
                            break
                assert not evaluation.interrupted
            draws.append(draw() == expected)
    return draws


def test_evaluation_restores_the_random_state(tmp_path):
    assert run(evaluate, str(tmp_path)) == [True, True, True]


def evaluate_behind_a_notice(directory: str) -> tuple[int, bool]:
    with Session(directory, model=nn.Linear(1, 1)) as session:
        give_notice(session)
        seen = 0
        with session.evaluation() as evaluation:
            for _ in evaluation.batches(range(5)):
                seen += 1
        return seen, evaluation.interrupted


def test_uninterruptible_evaluation_runs_to_its_end(tmp_path):
    assert run(evaluate_behind_a_notice, str(tmp_path)) == (5, False)


# -- another world size -------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [False, True])
def test_each_sample_is_used_once_from_two_ranks_to_one_and_back(tmp_path, drop_last):
    plan = Plan(str(tmp_path), size=41, batch=3, epochs=1, drop_last=drop_last)
    ranks = run_ranks(train_on_rank, 2, replace(plan, leave=(3, "after")))
    manifest = newest(tmp_path)
    assert (manifest.world_size, manifest.data_parallel_size) == (2, 2)
    assert (manifest.step, manifest.sample_start_index) == (3, 18)
    states = json.loads((checkpoints(tmp_path)[-1] / "running_states.json").read_text())
    assert states == {"epoch": 0, "step": 3, "sample_start_index": 9}  # per rank
    ranks.append(run(train, replace(plan, leave=(5, "after"))))
    manifest = newest(tmp_path)
    assert (manifest.world_size, manifest.sample_start_index) == (1, 24)
    if drop_last:
        ranks.append(run(train, plan))
    else:
        ranks += run_ranks(train_on_rank, 2, plan)
    samples = Counter(index for rank in ranks for _, _, group in rank["used"] for index in group)
    if drop_last:
        assert set(samples.values()) == {1}
        assert len(samples) == 24 + 17 // 3 * 3
    else:
        assert set(samples) == set(range(41))
        assert sum(samples.values()) == 42  # one for padding

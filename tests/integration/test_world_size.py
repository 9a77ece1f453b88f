"""The number of workers changes between runs; each sample of an epoch is still used once."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.job import SCRIPTS, Job

STEADY = SCRIPTS / "steady.py"
SIZES = (4, 2, 3, 1, 4)
EPOCHS = 3


class Changing(Job):
    """A job that runs on another number of workers each time."""

    def __init__(self, directory: Path, *arguments: str):
        super().__init__(directory, script=STEADY)
        self.given = list(arguments)
        self.runs = 0

    def run_on(self, workers: int, *options: str) -> Job:
        self.nproc = workers
        self.runs += 1
        self.arguments = [*self.given, "--trace", str(self.trace(self.runs))]
        return self.start(*options)

    def trace(self, run: int) -> Path:
        return self.root / f"trace-{run}"

    def steps(self) -> dict[int, list]:
        """(epoch, samples, sum of losses) of each step, as the last run that did it used them."""
        found: dict[int, list] = {}
        for run in range(1, self.runs + 1):
            did: dict[tuple[int, int], list] = {}
            for path in sorted(self.root.glob(f"trace-{run}.*")):
                for line in path.read_text().splitlines():
                    step, *rest = json.loads(line)
                    did[step, int(path.suffix[1:])] = rest
            for number in {step for step, _ in did}:
                ranks = [rest for (step, _), rest in sorted(did.items()) if step == number]
                samples = [index for _, used, *_ in ranks for index in used]
                found[number] = [ranks[0][0], samples, sum(rest[2] for rest in ranks)]
        return found


def disturb(job: Changing, how: int) -> None:
    """End the run by a notice, after a worker's death, or by the supervisor's, in turn."""
    if how % 3 == 1:
        before = job.view().incarnation
        os.kill(job.view().workers[-1].pid, signal.SIGKILL)
        job.until(lambda view: view.incarnation > before, "the next incarnation")
        job.until_training()
    if how % 3 == 2:
        job.process.kill()
        job.process.wait(30)
        return
    job.process.terminate()
    assert job.wait() == 75, job.output()


def run_through(sizes: Sequence[int], job: Changing, *options: str) -> None:
    """Run on each number of workers in turn, the last one to the end."""
    step = 0
    for turn, workers in enumerate(sizes[:-1]):
        job.run_on(workers, *options).until_step(step + 6)
        disturb(job, turn)
        step = job.view().newest_intact.step
    assert job.run_on(sizes[-1], *options).wait() == 0, job.output()


def used_per_epoch(steps: dict[int, list]) -> list[Counter[int]]:
    assert sorted(steps) == list(range(1, len(steps) + 1))
    epochs = [Counter[int]() for _ in range(EPOCHS)]
    for epoch, samples, _ in steps.values():
        epochs[epoch].update(samples)
    return epochs


@pytest.mark.one_torch
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (2, 2)])
def test_each_sample_is_used_once_at_changing_world_sizes(
    tmp_path: Path, workers: int, accumulation: int
) -> None:
    """At the end of an epoch, fewer samples are used twice than there are ranks."""
    arguments = ["--workers", str(workers), "--accumulation", str(accumulation), "--size", "203"]
    with Changing(tmp_path, *arguments, "--pause", "0.01") as job:
        run_through(SIZES, job, "--save-interval", "5")
        for used in used_per_epoch(job.steps()):
            assert set(used) == set(range(203))
            assert used.total() - 203 < max(SIZES)


@pytest.mark.one_torch
@pytest.mark.slow
def test_drop_last_skips_only_the_end_of_an_epoch(
    tmp_path: Path,
) -> None:
    arguments = ["--drop-last", "--accumulation", "2", "--size", "203", "--pause", "0.01"]
    with Changing(tmp_path, *arguments) as job:
        run_through(SIZES, job, "--save-interval", "5")
        for used in used_per_epoch(job.steps()):
            assert max(used.values()) == 1
            assert 203 - used.total() < max(SIZES) * 2 * 2  # an optimizer step of all ranks


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [(3, 1, 2), pytest.param(SIZES, marks=pytest.mark.one_torch)],
    ids=len,
)
def test_fixed_global_batch_gives_the_same_steps_at_any_world_size(
    tmp_path: Path, sizes: tuple[int, ...]
) -> None:
    """The same samples in each step, exactly once in all; losses differ only by rounding."""
    options = ("--global-batch", "24", "--save-interval", "5")
    with Changing(tmp_path / "fixed") as job:
        assert job.run_on(2, *options).wait() == 0, job.output()
        fixed = job.steps()
    with Changing(tmp_path / "changing", "--pause", "0.01") as job:
        run_through(sizes, job, *options)
        changing = job.steps()
    assert len(fixed) == EPOCHS * 480 // 24
    assert used_per_epoch(changing) == [Counter(range(480))] * EPOCHS
    for step, (epoch, samples, loss) in fixed.items():
        other_epoch, other_samples, other_loss = changing[step]
        assert (epoch, sorted(samples)) == (other_epoch, sorted(other_samples))
        assert other_loss == pytest.approx(loss, rel=1e-9)
    assert fixed[60][2] < fixed[1][2] / 10  # and the model learned


@pytest.mark.one_torch
@pytest.mark.slow
def test_global_batch_that_does_not_divide_is_an_error(tmp_path: Path) -> None:
    with Changing(tmp_path) as job:
        assert job.run_on(3, "--global-batch", "16").wait() == 64
        message = "a global batch of 16 is not a multiple of micro-batches of 2 on 3 ranks"
        assert f"{message}: use 1, 2, 4, 8 ranks" in job.output()
        assert job.view().incarnation == 1

"""Lightning's Trainer on another number of processes: each sample of the epoch once, or a line."""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path

import pytest

from elastic_ckpt import ElasticSampler
from tests.job import SCRIPTS, Job
from tests.marks import slow
from tests.waiting import until

pytest.importorskip("lightning")

SAMPLES, EPOCHS, SEED, BATCH = 180, 2, 3, 4
WARNING = "the rest of this epoch repeats some samples and skips others"
ORDER = list(ElasticSampler(range(SAMPLES), num_replicas=1, rank=0, seed=SEED))


class Resized(Job):
    """A job that is stopped in its first epoch, and resumed with another number of processes."""

    def __init__(self, directory: Path, order: str, workers: int = 0) -> None:
        trace = str(directory / "trace")
        script = SCRIPTS / "lightning_resize.py"
        super().__init__(directory, trace, order, str(workers), "0.05", script=script)

    def seen(self, epoch: int) -> list[int]:
        """Return the samples that all ranks have read in an epoch."""
        files = self.root.glob("trace.*")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [number for there, _, batch in lines if there == epoch for number in batch]

    def stop_after(self, nproc: int, batches: int) -> int:
        """Run until all processes have read some batches more, and return the samples read."""
        self.nproc, before = nproc, len(self.seen(0))
        self.start()
        until(lambda: len(self.seen(0)) >= before + batches * nproc * BATCH, seconds=90)
        self.process.send_signal(signal.SIGTERM)
        assert self.wait() == 75, self.output()
        return len(self.seen(0))

    def end(self, nproc: int) -> None:
        self.nproc = nproc
        assert self.start().wait() == 0, self.output()


@pytest.mark.parametrize(
    ("ranks", "workers"), [((2, 1), 0), slow((1, 2), 0), slow((2, 1, 2), 0), slow((1, 2, 1), 1)]
)
def test_elastic_sampler_uses_each_sample_once(
    ranks: tuple[int, ...], workers: int, tmp_path: Path
) -> None:
    with Resized(tmp_path, "elastic", workers) as job:
        for count in ranks[:-1]:
            done = job.stop_after(count, 5)
            assert sorted(job.seen(0)) == sorted(ORDER[:done])
        job.end(ranks[-1])
        for epoch in range(EPOCHS):
            assert sorted(job.seen(epoch)) == list(range(SAMPLES))
        assert WARNING not in job.log.read_text()


@pytest.mark.parametrize(
    ("order", "ranks"), [("shuffled", (2, 1)), slow("shuffled", (1, 2)), slow("sequential", (1, 2))]
)
def test_an_order_of_one_number_of_processes_is_reported(
    order: str, ranks: tuple[int, int], tmp_path: Path
) -> None:
    """Lightning replaces any order by a shuffled one of its own where there are several processes,
    even a sequential one."""
    with Resized(tmp_path, order) as job:
        job.stop_after(ranks[0], 5)
        job.end(ranks[1])
        assert job.log.read_text().count(WARNING) == 1
        assert sorted(job.seen(0)) != list(range(SAMPLES))
        assert sorted(job.seen(1)) == list(range(SAMPLES))


@pytest.mark.slow
def test_lightnings_own_shards_skip_no_sample(tmp_path: Path) -> None:
    """From 2 to 3 processes less than a batch is read twice, and a line says so."""
    with Resized(tmp_path, "shuffled") as job:
        more = job.stop_after(2, 5) % (3 * BATCH)
        job.end(3)
        counts = Counter(job.seen(0))
        assert set(counts) == set(range(SAMPLES))
        assert sum(counts.values()) - SAMPLES == more
        said = f"{more} samples of this epoch are read twice" in job.log.read_text()
        assert said == (more > 0)
        assert WARNING not in job.log.read_text()

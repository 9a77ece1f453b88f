"""An example's job that writes the samples of each rank, and prints its weights at the end."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

from tests.job import Job

EXAMPLES = Path(__file__).parents[2] / "examples"


class Example(Job):
    """A run of an example, with the batches that each of its ranks saw."""

    script: Path

    def __init__(self, directory: Path, nproc: int, *arguments: str) -> None:
        trace = ["--trace", str(directory / "trace")]
        super().__init__(directory, *trace, *arguments, nproc=nproc, script=type(self).script)

    def samples(self, rank: int) -> list[list]:
        path = self.root / f"trace.{rank}"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def until_batches(self, count: int) -> None:
        limit = time.monotonic() + 90
        while len(self.samples(self.nproc - 1)) < count:
            assert time.monotonic() < limit, self.output()
            assert self.process.poll() is None, self.output()
            time.sleep(0.02)

    def weights(self) -> set[str]:
        return set(re.findall(r"weights (\w+)", self.log.read_text()))

    def stop_twice(self, undisturbed: Example, *counts: int) -> None:
        """Preempt after these batches, and resume: each rank reads every batch once, to the same
        weights."""
        for count in counts:
            self.start().until_batches(count)
            self.process.send_signal(signal.SIGTERM)
            assert self.wait() == 75, self.output()
        assert self.start().wait() == 0, self.output()
        for rank in range(self.nproc):
            assert self.samples(rank) == undisturbed.samples(rank)
        assert self.weights() == undisturbed.weights()

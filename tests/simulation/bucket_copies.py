"""A bucket that is the job's place, as the loop sees it: uploads take time, and fail at times."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from elastic_ckpt.supervisor.ports import NO_CHECKPOINT, Key
from elastic_ckpt.supervisor.saves.mirror_port import forever
from tests.simulation.kernel import Kernel

if TYPE_CHECKING:
    from tests.simulation.run import Run


class SimBucket:
    """What the bucket of a job holds.

    Attributes:
        newest: the newest checkpoint that is sealed there.
        seconds: how long an upload takes.
        away_until: it does not answer before.
    """

    def __init__(self, kernel: Kernel, seed: int) -> None:
        draw = random.Random(
            seed ^ 0xB0C4E7
        )  # apart from the others, whose seeds stay what they are
        self.kernel = kernel
        self.newest: Key = NO_CHECKPOINT
        self.is_there = draw.random() < 0.5
        self.seconds = draw.choice((0.1, 2.0, 10.0))
        outage = draw.uniform(0.0, 120.0)
        self.away = (outage, outage + draw.choice((0.0, 5.0, 60.0)))

    @property
    def is_away(self) -> bool:
        return self.away[0] <= self.kernel.now < self.away[1]


class SimMirror:
    """See ``MirrorPort``; uploads of a run that is gone do not end."""

    lost = ""

    def __init__(self, run: Run, bucket: SimBucket) -> None:
        self._run = run
        self._bucket = bucket
        self._asked = self._is_busy = False

    def start(self) -> None:
        """Nothing to start."""

    def serve(self, newest: object) -> str:
        del newest
        if not self._is_busy and self._lacks:
            self._is_busy = True
            self._run.host.after(self._bucket.seconds, self._done)
        return "bucket"

    def _done(self) -> None:
        self._is_busy = False
        if self._run.is_gone:
            return
        if not self._bucket.is_away:
            self._bucket.newest = max(self._bucket.newest, self._run.world.disk.newest)
        self._run.wake(0.0)

    @property
    def _lacks(self) -> bool:
        return self._bucket.newest < self._run.world.disk.newest

    def hurry(self, left: Callable[[], float] = forever) -> None:
        """Uploads take what they take."""

    def flush(self) -> None:
        self._asked = True

    @property
    def flushed(self) -> bool:
        return not self._lacks

    @property
    def lacks(self) -> str:
        return "" if self._asked and not self._lacks else "the bucket lacks it"

    def close(self, left: Callable[[], float]) -> None:
        """No time is left, as far as a schedule goes."""
        del left

    def close_history(self, left: Callable[[], float]) -> None:
        """Nobody reads it here."""
        del left

"""An evaluation inside the training loop, as the script sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Evaluation:
    """Handed out by ``Session.evaluation``."""

    interruptible: bool
    interrupted: bool = field(default=False)
    _asked: Callable[[], bool] = field(default=lambda: False, repr=False)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; leaves the ``with`` block early if that was declared and a
        notice has come."""
        for batch in loader:
            if self.interruptible and self._asked():
                raise EvaluationLeft
            yield batch


class EvaluationLeft(Exception):
    """Leaves the body of an interruptible evaluation."""

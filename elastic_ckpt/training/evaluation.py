"""An evaluation within a session, during which a notice waits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from elastic_ckpt.protocol.slot import Phase, SlotWriter
from elastic_ckpt.training.state.rng import preserved_rng


@dataclass
class Evaluation:
    """An evaluation in progress, yielded by ``Session.evaluation``."""

    interruptible: bool
    interrupted: bool = field(default=False)
    _requested: Callable[[], bool] = field(default=lambda: False, repr=False)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yield the loader's batches; leave the ``with`` block early if it is interruptible and a
        save or stop is requested."""
        for batch in loader:
            if self.interruptible and self._requested():
                raise EvaluationLeft
            yield batch


class EvaluationLeft(Exception):
    """Leaves the body of an interruptible evaluation."""


@contextmanager
def evaluating(
    slot: SlotWriter, requested: Callable[[], bool], *, interruptible: bool
) -> Iterator[Evaluation]:
    """Run the body as an evaluation, and restore the random state afterwards; ``requested`` returns
    whether there is a save or stop to leave it for."""
    evaluation = Evaluation(interruptible, _requested=requested)
    before = slot.posted_phase
    slot.phase(Phase.EVALUATING)
    with preserved_rng():
        try:
            yield evaluation
        except EvaluationLeft:
            evaluation.interrupted = True
        finally:
            slot.phase(before)

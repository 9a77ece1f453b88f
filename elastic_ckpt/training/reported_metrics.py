"""The metrics that a script reports, for its checkpoints and for ``status``."""

from __future__ import annotations

import math
from collections.abc import Mapping

from elastic_ckpt.errors import NonFiniteLoss, UsageError
from elastic_ckpt.protocol.slot import SlotWriter


class ReportedMetrics:
    """The newest finite value of each metric; ``slot`` shows them to the supervisor once it is
    set."""

    def __init__(self) -> None:
        self.slot: SlotWriter | None = None
        self._values: dict[str, float] = {}

    @property
    def values(self) -> dict[str, float]:
        """A copy of the values, by name."""
        return dict(self._values)

    def resume(self, saved: Mapping[str, float]) -> None:
        """Start from a checkpoint's metrics; what was reported since counts more."""
        self._values = {**saved, **self._values}

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take over new values.

        A value that is not finite removes the metric: no checkpoint is the best by an old value.

        Args:
            step: the step in progress, for the message.

        Raises:
            UsageError: a value is not a number.
            NonFiniteLoss: ``loss`` is not finite.
        """
        for name, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
                raise UsageError(f"report({name}=...) needs a number, not {value!r:.80}") from None
            self._values.pop(name, None)
            if name == "loss" and not math.isfinite(number):
                raise NonFiniteLoss(f"the loss of step {step} is {number}")
            if math.isfinite(number):
                self._values[name] = number
                if self.slot is not None:
                    self.slot.metric(name, number)

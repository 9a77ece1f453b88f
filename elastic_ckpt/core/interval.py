"""How often to save: every so many steps or seconds, or as often as pays."""

from __future__ import annotations

import re
from dataclasses import dataclass

from elastic_ckpt.errors import UsageError


@dataclass(frozen=True)
class SaveInterval:
    """One of the three at most; none of them means never.

    Attributes:
        steps: optimizer steps between saves.
        seconds: seconds between saves.
        auto: seconds, found from what a save costs and how often the job fails.
    """

    steps: int = 0
    seconds: float = 0.0
    auto: bool = False

    def __str__(self) -> str:
        """For people."""
        if self.auto:
            return "auto"
        if self.steps:
            return f"{self.steps} steps"
        return f"{self.seconds:g}s" if self.seconds else "as the script says"

    @property
    def told_steps(self) -> int:
        """What the ranks are told: 0 leaves the script's own interval, as nothing was asked for.

        Of one in seconds the supervisor asks for each save, and -1 keeps the script from its own.
        """
        return -1 if self.seconds or self.auto else self.steps

    def due(self, step: int) -> bool:
        """Whether a save follows from the step number alone, alike on every rank."""
        return self.steps > 0 and step > 0 and step % self.steps == 0


def parse_interval(text: str) -> SaveInterval:
    """Read ``100`` (steps), ``90s`` (seconds) or ``auto``.

    Raises:
        UsageError: the text is none of them.
    """
    if text.strip() == "auto":
        return SaveInterval(auto=True)
    match = re.fullmatch(r"(\d{1,12})|(\d{1,12}(?:\.\d{1,9})?)s", text.strip(), re.ASCII)
    if match is None:
        raise UsageError(
            f"--save-interval {text!r} is neither steps (100) nor seconds (90s) nor auto"
        )
    if match[1] is not None:
        return SaveInterval(steps=int(match[1]))
    return SaveInterval(seconds=float(match[2]))

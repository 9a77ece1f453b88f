"""Says what looks like a mistake in ``--watch`` and ``--complete-when``: each thing once.

A pattern that matches nothing, or a last file that is never there, would otherwise show only when a
restart finds nothing to resume from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.own.files import Found
from elastic_ckpt.checkpoint.own.seal import OwnSeal
from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.own_saves import FileStamps, Growth, OwnSaves, never_marked
from elastic_ckpt.util.units import human_duration

PATIENCE_SECONDS: Final = 600.0
"""After which a pattern without a match, or a checkpoint that is never complete, is a mistake."""


class Mistakes:
    """What was said of one job's patterns."""

    def __init__(self, base: Path, say: Callable[[str], None]) -> None:
        """``base`` is what relative patterns start from; ``say`` shows one line to the user."""
        self._base, self._say = base, say
        self._said: set[str] = set()
        self._looking_since = 0.0

    def looked(self, rules: OwnSaves, every: Sequence[Found], now: float) -> None:
        """Tell what is there at monotonic ``now``."""
        self._looking_since = self._looking_since or now
        waited = now - self._looking_since
        if rules and not every and waited >= PATIENCE_SECONDS and not rules.complete.at_exit:
            self._once("", f"{self._nothing(rules)} after {human_duration(waited)}; {self._from}")

    def incomplete(self, rules: OwnSaves, found: Found, growth: Growth, now: float) -> None:
        """Tell of one that is not complete at monotonic ``now``, while the script runs."""
        still, grown = now - growth.since, now - growth.begun
        rule = rules.complete.of(is_file=found.is_file)
        if grown < PATIENCE_SECONDS or rule.at_exit:
            return
        rests = still >= PATIENCE_SECONDS
        if not rests and rule.marker:
            return  # it may still be writing, or waits for the other ranks
        how = (
            f"has not changed for {human_duration(still)}, but"
            if rests else f"has been changing for {human_duration(grown)}, so"
        )  # fmt: skip
        self._once(
            str(found.path),
            f"{found.path} {how} is not complete by --complete-when {rule}: it is not sealed, and "
            "a restart sets it aside",
        )

    def ended(self, rules: OwnSaves, every: Sequence[Found], known: Collection[Path]) -> None:
        """Tell, once the script has ended, that nothing it wrote could be sealed."""
        if not every:
            self._once("", f"{self._nothing(rules)}, and the script has ended; {self._from}")
        elif not any(found.path in known for found in every):
            path, is_file = every[-1].path, every[-1].is_file
            self._once(
                str(path),
                f"{path} is not complete by --complete-when {rules.complete.of(is_file=is_file)}: "
                "nothing is sealed",
            )

    def elsewhere(self, every: Sequence[OwnSeal], ours: Sequence[OwnSeal]) -> None:
        """Tell before a start that what is sealed lies where no pattern leads."""
        if every and not ours:
            self._once(
                "elsewhere",
                f"no sealed checkpoint of this job matches --watch; the newest is {every[0].path}; "
                f"{self._from}",
            )

    def _once(self, subject: str, line: str) -> None:
        if subject not in self._said:
            self._said.add(subject)
            self._say(line)

    def _nothing(self, rules: OwnSaves) -> str:
        return f"--watch {' '.join(rules.watch)}: nothing is there"

    @property
    def _from(self) -> str:
        return f"relative patterns start from {self._base}"


def require_marker(
    rules: OwnSaves, torn: Sequence[tuple[Found, FileStamps]], every: Sequence[OwnSeal]
) -> None:
    """Refuse to move several checkpoints because none has the last file.

    Raises:
        UsageError: its name must be wrong; all that the script has saved would be set aside.
    """
    ever_sealed = any(not one.is_file for one in every)
    directories = [stamps for found, stamps in torn if not found.is_file]
    if never_marked(rules.complete, directories, ever_sealed=ever_sealed):
        raise UsageError(
            f"none of the {len(directories)} checkpoints of --watch {' '.join(rules.watch)} has "
            f"{rules.complete.marker}; they were left where they are: give --complete-when the "
            "file that the script writes last, or move them away"
        )

"""Says what looks like a mistake in ``--watch`` and ``--complete-when``: each thing once.

A pattern that matches nothing, or a last file that is never there, would otherwise show only when a
restart finds nothing to resume from. Until one is sealed, ``status`` shows it much earlier.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from elastic_ckpt.checkpoint.own.files import Found, stamps_of
from elastic_ckpt.checkpoint.own.seal import OwnSeal
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.node_record import OwnTrouble
from elastic_ckpt.policy.own_saves import FileStamps, Growth, OwnSaves, never_marked
from elastic_ckpt.util.units import human_duration

PATIENCE_SECONDS: Final = 600.0
"""After which a pattern without a match, or a checkpoint that is never complete, is a mistake."""


SHOWN_SECONDS: Final = 60.0
"""After which ``status`` shows it, if nothing was ever sealed."""


class Mistakes:
    """What was said of one job's patterns.

    Attributes:
        trouble: why nothing is sealed, for ``status``; None if something is, or may be soon.
    """

    def __init__(self, base: Path, say: Callable[[str], None]) -> None:
        """``base`` is what relative patterns start from; ``say`` shows one line to the user."""
        self._base, self._say = base, say
        self.trouble: OwnTrouble | None = None
        self._said: set[str] = set()
        self._looking_since = 0.0

    def looked(
        self,
        rules: OwnSaves,
        every: Sequence[Found],
        growing: Mapping[Path, Growth],
        newest: OwnSeal | None,
        now: float,
    ) -> None:
        """Tell what is there, and what of it is not sealed, at monotonic ``now``."""
        self._looking_since = self._looking_since or now
        waited = now - self._looking_since
        if newest is not None or not rules or rules.complete.at_exit:
            self.trouble = None
        elif not every:
            self._trouble(rules, every, waited)
            if waited >= PATIENCE_SECONDS:
                self._once(
                    "", f"{self._nothing(rules)} after {human_duration(waited)}; {self._from}"
                )
        else:
            grown = [now - one.begun for one in growing.values()]
            still = [now - one.since for one in growing.values()]
            # One that still changes may be a large save; behind it a second one would not begin.
            times = grown if len(every) > 1 or max(grown, default=0) > PATIENCE_SECONDS else still
            waited = max(times, default=0.0)
            self._trouble(rules, every, waited if waited > 2 * rules.complete.quiet else 0.0)

    def _trouble(self, rules: OwnSaves, every: Sequence[Found], waited: float) -> None:
        """Note why nothing is sealed, if that has lasted for long enough."""
        if waited < SHOWN_SECONDS:
            self.trouble = None
            return
        directories = [stamps_of(found.path) for found in every if not found.is_file]
        refused = never_marked(rules.complete, directories, ever_sealed=False)
        found = OwnTrouble(self._why(rules, every), time.time() - waited, refused)
        if self.trouble is None or self.trouble.text != found.text:
            self.trouble = found

    def _why(self, rules: OwnSaves, every: Sequence[Found]) -> str:
        if not every:
            return f"{self._nothing(rules)}; {self._from}"
        how_many = "one checkpoint is" if len(every) == 1 else f"{len(every)} checkpoints are"
        rule = rules.complete.of(is_file=every[-1].is_file)
        none = "not" if len(every) == 1 else "none"
        return (
            f"--watch {' '.join(rules.watch)}: {how_many} there, {none} complete by "
            f"--complete-when {rule}"
        )

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
        if any(found.path in known for found in every):
            return
        self._trouble(rules, every, SHOWN_SECONDS)
        if not every:
            self._once("", f"{self._nothing(rules)}, and the script has ended; {self._from}")
        else:
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

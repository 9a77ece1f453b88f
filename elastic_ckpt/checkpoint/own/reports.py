"""Where the keeper of the script's own checkpoints reports to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elastic_ckpt.checkpoint.own.seal import OwnSeal
from elastic_ckpt.util.progress import Watch


@dataclass(frozen=True)
class Reports:
    """Where the keeper reports to.

    Attributes:
        sealed: called with each new seal.
        aside: called with each path that was set aside, where it is now, and why.
        watch: shows progress of long reading.
        say: shows one line to the user.
    """

    sealed: Callable[[OwnSeal], None]
    aside: Callable[[Path, Path, str], None]
    watch: Watch
    say: Callable[[str], None]

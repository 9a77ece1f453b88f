"""The Sessions of one process: one after the other, each with a name of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

from elastic_ckpt.errors import UsageError


@dataclass
class OpenedSessions:
    """Which Sessions this process has had.

    Attributes:
        names: of those that were entered; empty for the unnamed one.
        is_open: whether the last of them has not ended.
        saved: whether one of them has ended with all its work in a checkpoint.
    """

    names: list[str] = field(default_factory=list)
    is_open: bool = False
    saved: bool = False

    def check(self, name: str) -> None:
        """Check that a Session of this name may be entered now.

        Raises:
            UsageError: another one is open, or this one was entered before.
        """
        if self.is_open:
            raise UsageError(
                f"{_shown(name)} is entered inside {_shown(self.names[-1])}: leave that one first, "
                "or train both models in one Session, as in model=nn.ModuleList([first, second])"
            )
        if name in self.names:
            what = "a second Session in one process" if not name else f"a second {_shown(name)}"
            raise UsageError(
                f"{what} would continue from the first one's checkpoints: give each a name of its "
                'own, as in Session(name="pretrain", ...), then Session(name="head", ...); to '
                "continue the first one, start the script again (in a notebook, restart the kernel)"
            )

    def enter(self, name: str) -> None:
        """Note that a Session begins."""
        self.names.append(name)
        self.is_open = True

    def leave(self, *, saved: bool) -> None:
        """Note that it has ended; ``saved`` if all its work is in a checkpoint."""
        self.is_open = False
        self.saved = self.saved or saved


def _shown(name: str) -> str:
    return f'Session(name="{name}")' if name else "the unnamed Session"

"""Each rank's own state: its random state, and the objects that a script adds."""

from __future__ import annotations

from typing import Any

from elastic_ckpt.errors import CheckpointRejected, ElasticCkptError
from elastic_ckpt.training.state.candidate import Loaded
from elastic_ckpt.training.state.load import read_rank_state
from elastic_ckpt.training.state.rng import capture_rng, diverge_rng, restore_rng
from elastic_ckpt.util.text import printable


class RankState:
    """Captured at a save; restored in two parts, as the random state follows later. ``extra`` has
    objects with ``state_dict`` and ``load_state_dict``, by name."""

    def __init__(self, extra: dict[str, Any]) -> None:
        self.extra = extra
        self._rng: dict[str, Any] | None = None
        self._rng_iterating = True
        self._new_rank = 0
        self._name = ""

    def capture(self, *, iterating: bool) -> dict[str, Any]:
        """Return the current state; ``iterating``: this epoch's DataLoader iterator exists."""
        extra = {name: thing.state_dict() for name, thing in self.extra.items()}
        return {"rng": capture_rng(), "iterating": iterating, "extra": extra}

    def resume(self, loaded: Loaded, rank: int) -> None:
        """Restore what the script added; the random state waits for :meth:`restore_rng`.

        A rank that did not exist when the checkpoint was made takes another rank's state, and
        derives a random state of its own from it.

        Raises:
            ElasticCkptError: an object was not saved.
        """
        self._name = loaded.seal.checkpoint_name
        state = read_rank_state(loaded, rank)
        if state is None:
            return
        self._rng = state["rng"]
        self._new_rank = rank if rank >= loaded.seal.world_size else 0
        self._rng_iterating = state.get("iterating", True)
        for name, thing in self.extra.items():
            if name not in state["extra"]:
                raise ElasticCkptError(
                    f"{self._name} has no state for extra={name!r}, as it was saved without it: "
                    "leave it out, or start over with a new --dir"
                )
            thing.load_state_dict(state["extra"][name])

    def restore_rng(self, *, iterating: bool = True, keep: bool = False) -> None:
        """Restore the random state, once unless ``keep`` is true.

        Creating a DataLoader's iterator draws from it. So a state that was saved after that is
        restored after it, and one that was saved between two epochs is restored before it.

        Args:
            iterating: whether the iterator exists; a state of the other kind is left alone.

        Raises:
            CheckpointRejected: what was saved is not a random state.
        """
        if self._rng is None or self._rng_iterating is not iterating:
            return
        try:
            restore_rng(self._rng)
            if self._new_rank:
                diverge_rng(self._new_rank)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            first = printable("".join(str(error).splitlines()[:1]))
            raise CheckpointRejected(
                f"the random state in {self._name} cannot be restored: {first}"
            ) from None
        self._rng = self._rng if keep else None

"""Each rank's own state: its random state, what a script adds, and buffers that differ by rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from elastic_ckpt.errors import CheckpointRejected, ElasticCkptError
from elastic_ckpt.training.data.places import are_places, lost_places
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.script.frozen import frozen_otherwise, frozen_parameters
from elastic_ckpt.training.script.settings import ScriptSettings
from elastic_ckpt.training.state.candidate import Readable
from elastic_ckpt.training.state.holding import Holding, Names
from elastic_ckpt.training.state.module_values import broadcast_names, restore_module_values
from elastic_ckpt.training.state.rng import capture_rng, diverge_rng, restore_rng
from elastic_ckpt.training.tensors.state_codec import read_state
from elastic_ckpt.util.text import printable

_DOCS: Final = "docs/elastic.md#state-that-differs-by-rank"


class RankState:
    """Captured at a save; restored in two parts, as the random state follows later. ``extra`` has
    objects with ``state_dict`` and ``load_state_dict``, by name.

    Attributes:
        settings: what the script gave optimizer and schedule.
        replaced: lines on those that a checkpoint has with other values.
        places: of the script's loaders, as they were saved; ``places_now`` returns them as they
            are, to be saved.
        scale: ranks that saved the places per rank of this run.
    """

    def __init__(self, extra: dict[str, Any], model: Any = None) -> None:
        self.extra = extra
        self.model = model
        self.settings = ScriptSettings()
        self.replaced: list[str] = []
        self._frozen: Any = None  # as it was saved, until it was compared
        self.places: list[dict[str, Any] | None] = []
        self.places_now: Callable[[], list[dict[str, Any] | None]] = list
        self.scale = 1.0
        self._rng: dict[str, Any] | None = None
        self._rng_iterating = True
        self._new_rank = 0
        self._name = ""

    def hold(self) -> Holding:
        """Return what other ranks may hold differently, as it is now."""
        return Holding(self.model, self.extra)

    def capture(
        self, rank: int, held: Holding, unequal: Names, *, iterating: bool
    ) -> dict[str, Any]:
        """Return the current state; ``iterating``: this epoch's DataLoader iterator exists."""
        own = held.to_write(rank, unequal)
        return {
            "rng": capture_rng(),
            "iterating": iterating,
            "settings": self.settings.saved,
            "frozen": frozen_parameters(self.model),
            "places": self.places_now(),
            **own,
        }

    def resume(self, loaded: Readable, peers: Peers) -> str:
        """Restore what differs by rank; the random state waits for :meth:`restore_rng`.

        A rank that did not exist when the checkpoint was made takes another rank's state, and
        derives a random state of its own from it. With another number of ranks the model stays as
        the engine has loaded it.

        Returns:
            What was not restored bit for bit, and why; empty if everything was.

        Raises:
            ElasticCkptError: an object was not saved.
            CheckpointError: another kind of optimizer was saved.
        """
        rank, saved_by = peers.rank, loaded.seal.world_size
        self._name = loaded.seal.checkpoint_name
        state = read_rank_state(loaded, rank % saved_by)
        if state is None:
            return ""
        self.replaced = self.settings.resume(state.get("settings"), self._name)
        self._frozen = state.get("frozen")
        self._rng = state["rng"]
        self._new_rank = rank if rank >= saved_by else 0
        self._rng_iterating = state.get("iterating", True)
        shared = state.get("shared")
        self._resume_extra(loaded, state["extra"], shared or [])
        self.places, self.scale = state.get("places", []), saved_by / peers.world_size
        places = lost_places(filter(None, self.places), saved_by, peers.world_size)
        if saved_by == peers.world_size:
            restore_module_values(self.model, state.get("model", {}))
            return places
        if shared is None:  # an earlier version did not compare
            return ""
        buffers = len(state["model"].keys() - broadcast_names(self.model))
        lost = _lost(buffers, len(self.extra.keys() - shared), saved_by, peers.world_size)
        return "; ".join(filter(None, (lost, places)))

    def _resume_extra(self, loaded: Readable, own: dict[str, Any], shared: list[str]) -> None:
        common = {} if self.extra.keys() <= own.keys() else (read_rank_state(loaded, 0) or {})
        for name, thing in self.extra.items():
            if name in own:
                thing.load_state_dict(own[name])
            elif name in shared and name in common.get("extra", {}):
                thing.load_state_dict(common["extra"][name])
            else:
                raise ElasticCkptError(
                    f"{self._name} has no state for extra={name!r}, as it was saved without it: "
                    "leave it out, or start over with a new --dir"
                )

    def frozen_otherwise(self, epoch: int) -> str:
        """Return a line if the script freezes other parameters than at the save; empty if not, and
        from the second call on.

        A save at the end of an epoch has what that epoch froze, so the first call belongs to the
        end of the first step, or of the pass if that has none left.
        """
        before, self._frozen = self._frozen, None
        if before is None:
            return ""
        return frozen_otherwise(before, frozen_parameters(self.model), self._name, epoch)

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


def read_rank_state(loaded: Readable, rank: int) -> dict[str, Any] | None:
    """Return what a rank wrote of its own; None if the checkpoint has no such states.

    Raises:
        CheckpointRejected: it is not a rank's state.
    """
    path, seal, name = loaded.path, loaded.seal, f"{rank:05d}"
    if not any(entry.path == f"ranks/{name}.json" for entry in seal.files):
        return None
    state = read_state(path / "ranks", name)
    if not (
        isinstance(state, dict)
        and isinstance(state.get("rng"), dict)
        and isinstance(state.get("extra"), dict)
        and isinstance(state.get("model", {}), dict)
        and are_places(state.get("places", []))
        and isinstance(shared := state.get("shared", []), list)
        and all(isinstance(one, str) for one in shared)
        and ("model" in state) is ("shared" in state)
    ):
        raise CheckpointRejected(f"ranks/{name} in {seal.checkpoint_name} is not a rank's state")
    return state


def _lost(buffers: int, objects: int, before: int, now: int) -> str:
    """Return what another number of ranks cannot restore; empty for nothing."""
    parts = []
    if buffers:
        parts.append(f"of {_count(buffers, 'buffer')} every rank has rank 0's")
    if objects:
        parts.append(f"of {_count(objects, 'extra object')} rank N has that of rank N % {before}")
    if not parts:
        return ""
    return (
        f"its {before} ranks differed, and {_count(now, 'rank')} cannot have all of that: "
        f"{', '.join(parts)}; see {_DOCS}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"

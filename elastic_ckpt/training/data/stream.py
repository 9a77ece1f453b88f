"""The place in a loader that no ``ElasticSampler`` feeds: by its own state, or by a count.

A loader with ``state_dict`` says itself where it is: after the batch that it yielded last, whatever
its workers have prefetched. What the optimizers have consumed may be less than that, as where the
script looks ahead. So a place is a state of the loader, and the batches to skip after it. Without
states it is the start of the pass, with the random state in which that began.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from typing import Any, Final, Literal

from elastic_ckpt.errors import DataMismatch, UsageError
from elastic_ckpt.training.data.consumption import Consumption
from elastic_ckpt.training.data.sampler import ElasticSampler
from elastic_ckpt.training.state.rng import capture_rng, preserved_rng, restore_rng

How = Literal["order", "state", "skip", "approximate"]
"""How a place is found again; ``order`` is an ElasticSampler's, which needs no :class:`Stream`."""

_KEPT: Final = 64
"""States that are kept while the script looks ahead; from the pass's start, batches are skipped."""


class Stream:
    """A rank's place in one loader, through all epochs of a Session.

    Attributes:
        handed: batches of this pass that the script has received, also before a resume.
        anew: batches before a resume that are read again, as nothing tells where the loader was.
    """

    def __init__(
        self, consumption: Consumption, saved: dict[str, Any] | None, *, scale: float = 1.0
    ) -> None:
        """``saved`` is what :meth:`entry` returned; ``scale``: ranks at the save per rank now."""
        self.handed = self.anew = 0
        self._consumption = consumption
        self._saved = saved
        self._scale = scale
        self._loader: Any = None
        self._how: How = "skip"
        self._epoch = -1
        self._over = False
        self._final: Any = None
        self._base: dict[str, Any] = {}
        self._base_count = 0
        self._states: deque[tuple[int, Any]] = deque(maxlen=_KEPT)

    def begin(self, loader: Any, how: How, epoch: int) -> Iterator[Any]:
        """Begin the pass of an epoch, where the checkpoint was made if that was in it.

        Raises:
            Exception: whatever the loader raises, as for a state that it refuses.
        """
        resumed, before = self._saved, self.entry(epoch)
        self._saved = None
        self._loader, self._how, self._epoch = loader, how, epoch
        self._states.clear()
        self.handed = self._base_count = self.anew = 0
        self._over = False
        self._base = {"state": None, "left": False, "skip": 0, "rng": capture_rng()}
        if before is None:
            return iter(loader)
        continues = before["epoch"] == epoch
        if "approximate" in (how, before["how"]):
            said = before["how"] == "approximate"  # when the checkpoint was loaded
            self.anew = before["batches"] if continues and not before["over"] and not said else 0
            return iter(loader)
        self._base["state"] = before["state"]
        self._base["left"] = before["left"] if continues else not before["over"]
        return iter(loader) if resumed is None else self._resume(before, continues=continues)

    def _resume(self, before: dict[str, Any], *, continues: bool) -> Iterator[Any]:
        loader, state = self._loader, before["state"]
        if state is not None and self._how == "state":
            loader.load_state_dict(copy.deepcopy(state))
            loader.state_dict()  # torchdata's makes its iterator here, which draws random numbers
        if continues and before["over"]:
            self._final, self._over, self.handed = state, True, before["batches"]
            return iter(())
        if continues and before["rng"] is not None:
            restore_rng(before["rng"])
            self._base["rng"] = before["rng"]
        if self._base["left"] and self._how == "state":
            with preserved_rng():  # the pass that was left, which may be a generator
                next(iter(loader), None)
        iterator: Iterator[Any] = iter(loader)
        if continues:
            skipped = round(before["skip"] * self._scale)
            for done in range(skipped):
                if next(iterator, self) is self:
                    raise DataMismatch(f"it ended after {done} of the {skipped} batches used")
            self.handed = round(before["batches"] * self._scale)
            self._base_count = self.handed - skipped
        return iterator

    def hand_out(self) -> None:
        """Count a batch that the script receives."""
        self.handed += 1
        used = self._consumption
        if self._how == "state" and used.watched and used.ahead != 0:
            self._states.append((self.handed, self._state()))

    def end(self) -> None:
        """Note that the pass has been read to its end."""
        if not self._over:
            self._over, self._final = True, self._state()

    def entry(self, epoch: int, unused: int = 0) -> dict[str, Any] | None:
        """Return the place of a checkpoint of ``epoch``, for :meth:`begin`.

        Args:
            unused: batches that the script has, and no optimizer has consumed.
        """
        if self._epoch < 0:
            return self._saved
        here = {"how": self._how, "epoch": self._epoch, "over": self._over}
        fresh = {"left": False, "skip": 0, "rng": None}
        if self._over:
            return {**here, **fresh, "batches": self.handed, "state": self._final}
        count = self.handed - (unused if epoch == self._epoch else 0)
        here["batches"] = count
        if self._how == "state" and count > self._base_count:
            states = dict(self._states) | ({self.handed: None} if count == self.handed else {})
            if count in states:
                state = self._state() if count == self.handed else states[count]
                return {**here, **fresh, "state": state}
        return {**here, **self._base, "skip": count - self._base_count}

    def _state(self) -> Any:
        return copy.deepcopy(self._loader.state_dict()) if self._how == "state" else None


class OrderStream(Stream):
    """The place of a loader with an ElasticSampler that is read beside the one that counts steps:
    a number of samples, for any number of ranks."""

    _start = 0

    def begin(self, loader: Any, how: How, epoch: int) -> Iterator[Any]:
        """Begin the pass of an epoch of this loader's own."""
        saved, self._saved = self._saved, None
        continues = saved is not None and saved["epoch"] == epoch
        self._loader, self._how, self._epoch = loader, how, epoch
        self._start = saved["samples"] if saved is not None and continues else 0
        self.handed, self._over = 0, False
        sampler: ElasticSampler = loader.sampler
        sampler.set_position(epoch, self._start)
        return iter(loader)

    def entry(self, epoch: int, unused: int = 0) -> dict[str, Any] | None:
        """Return the place, as :class:`Stream` does."""
        if self._epoch < 0:
            return self._saved
        count, sampler = max(0, self.handed - unused), self._loader.sampler
        samples = self._start + count * self._loader.batch_size * sampler.num_replicas
        return {
            "how": "order", "epoch": self._epoch, "over": False, "batches": count,
            "samples": samples, "state": None, "left": False, "skip": 0, "rng": None,
        }  # fmt: skip

    def hand_out(self) -> None:
        """Count a batch that the script receives."""
        self.handed += 1

    def end(self) -> None:
        """Note that the pass has been read to its end."""


class Beside:
    """A loader that is read beside the one that counts steps. It continues through the epochs of
    the session, and begins anew at its own end."""

    def __init__(self, stream: Stream, loader: Any, how: How, epoch: int) -> None:
        self.stream = stream
        self.epoch = epoch
        self._loader = loader
        self._how = how
        self._iterator = stream.begin(loader, how, epoch)

    def next(self) -> Any:
        """Return its next batch. UsageError if it has none at all."""
        for _ in range(2):
            for batch in self._iterator:
                self.stream.hand_out()
                return batch
            self.stream.end()
            self.epoch += 1
            self._iterator = self.stream.begin(self._loader, self._how, self.epoch)
        raise UsageError("a loader in session.batches yields no batches, from its own start on")

"""The time that a rank spends on its own part of a step, without waiting for other ranks.

A rank waits where gradients are reduced: between the last gradient of a backward pass, which is
that of the model's first parameter, and the optimizer's step. On a GPU the host runs ahead of the
work, so the device's own clock is read instead, for one step in sixteen.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from elastic_ckpt.protocol.slot import SlotWriter
from elastic_ckpt.training.data.consumption import Consumption

SAMPLED: Final = 16
_WEIGHT: Final = 0.2
"""Weight of the newest step in the mean; the first steps, which compile, fade soon."""


class StepTimer:
    """Times one rank's steps from the stages that a session reports, without any system call.

    Args:
        slot: receives the moving means of own work and of the whole step, in nanoseconds.
        model: its parameters' gradients mark the start of the wait; without any, waiting counts
            as work.
        make_event: creates a timing event; by default torch's, if the parameters are on a GPU.
        consumption: receives each backward pass.
    """

    def __init__(
        self,
        slot: SlotWriter,
        model: Any,
        make_event: Callable[[], Any] | None = None,
        consumption: Consumption | None = None,
    ) -> None:
        self._slot = slot
        self._consumption = consumption or Consumption()
        self._since = 0
        self._reached = 0  # time of the micro-batch's last gradient
        self._resumed = 0  # time of the optimizer's step after it
        self._own = 0  # own work of this step so far
        self._step_began = 0
        self._steps = 0
        self._busy_mean = self._step_mean = 0.0
        self._events: tuple[Any, Any] | None = None
        self._fetch = 0
        self._sampling = self._ended = False  # this step is sampled, and reached its last gradient
        self._unread = -1  # fetching time of the step whose events are not read yet
        self._hook: Any = None
        first = next((one for one in model.parameters() if one.requires_grad), None)
        if first is None or not hasattr(first, "register_post_accumulate_grad_hook"):
            return
        self._hook = first.register_post_accumulate_grad_hook(self.gradient_ready)
        if make_event is None and first.is_cuda:
            make_event = partial(_CudaEvent, first.device)
        if make_event is not None:
            self._events = make_event(), make_event()

    def detach(self) -> None:
        """Take the hook off the model."""
        if self._hook is not None:
            self._hook.remove()

    def fetching(self) -> None:
        """Fetching of the next batch begins."""
        self._since = time.monotonic_ns()

    def fetched(self) -> None:
        """The batch is fetched."""
        spent = time.monotonic_ns() - self._since
        self._own += spent
        self._fetch += spent

    def handed_out(self) -> None:
        """The script receives the batch and begins to compute."""
        self._reached = self._resumed = 0
        self._since = time.monotonic_ns()
        if self._events is None or self._sampling or self._unread >= 0:
            return
        if self._steps % SAMPLED == 1:  # not the first one, which compiles
            self._sampling, self._ended = True, False
            self._record(0)

    def taken_back(self) -> None:
        """The script requests the next batch."""
        now = time.monotonic_ns()
        self._own += (self._reached or now) - self._since
        if self._reached and self._resumed:
            self._own += now - self._resumed

    def optimizing(self) -> None:
        """The optimizer begins its step: the gradients are complete."""
        self._resumed = time.monotonic_ns()

    def stepped(self) -> None:
        """A step is finished."""
        now = time.monotonic_ns()
        own = self._own if self._events is None else self._on_device(self._events)
        if self._step_began:
            self._step_mean = self._mean(self._step_mean, now - self._step_began)
            if own:
                self._busy_mean = self._mean(self._busy_mean, own)
            self._slot.pace(int(self._busy_mean), int(self._step_mean))
        self._step_began = now
        self._steps += 1
        self._own = self._fetch = 0

    def interrupted(self) -> None:
        """Something other than a step came between: a save, an evaluation, a new epoch."""
        self._step_began = 0
        self._sampling, self._unread = False, -1

    def _mean(self, before: float, new: float) -> float:
        return new if not before else before + _WEIGHT * (new - before)

    def gradient_ready(self, _: Any = None) -> None:
        """A gradient is complete that the backward pass computes last: the hook of a parameter."""
        self._reached = time.monotonic_ns()
        self._consumption.backward()
        if self._sampling:
            self._ended = True
            self._record(1)

    def _record(self, index: int) -> None:
        """Record an event; after an error use the host's clock: timing must not fail the job."""
        try:
            if self._events is not None:
                self._events[index].record()
        except RuntimeError:
            self._events = None

    def _on_device(self, events: tuple[Any, Any]) -> int:
        """Return the nanoseconds of the last sampled step once the device finished it, else 0."""
        if self._sampling:
            self._sampling = False
            self._unread = self._fetch if self._ended else -1
        try:
            if self._unread < 0 or not events[1].query():
                return 0
            fetch, self._unread = self._unread, -1
            return int(events[0].elapsed_time(events[1]) * 1e6) + fetch
        except RuntimeError:
            self._events = None
            return 0


class _CudaEvent:
    """A timing event on one device's stream, whatever the current device is."""

    def __init__(self, device: Any) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._device = device
        self._event = self._cuda.Event(enable_timing=True)

    def record(self) -> None:
        self._event.record(self._cuda.current_stream(self._device))

    def query(self) -> bool:
        return bool(self._event.query())

    def elapsed_time(self, other: _CudaEvent) -> float:
        return float(self._event.elapsed_time(other._event))

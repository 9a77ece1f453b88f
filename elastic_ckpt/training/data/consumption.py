"""How many micro-batches of a pass the optimizers have consumed.

What the loader handed out is not what the state holds: an iterator around ``session.batches`` may
look ahead, and a script may accumulate without saying so. Hooks tell when the model's gradients are
computed and when an optimizer steps. A pass in which ``n`` micro-batches were handed out before the
first backward pass looks ``n - 1`` ahead; each optimizer step then consumes what was handed out at
the backward pass before it, less that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from elastic_ckpt.errors import UsageError

_IDLE_STEPS: Final = 8
"""An optimizer that has not stepped for this many of its steps is not in use any more."""


def inner_optimizer(optimizer: Any) -> Any:
    """Return the torch optimizer in a ColossalAI wrapper, or the optimizer itself."""
    return getattr(optimizer, "optim", optimizer)


@dataclass
class _Steps:
    """One optimizer's steps.

    Attributes:
        at: what was handed out at the last one; below 1 if that was in an earlier pass.
        spacing: micro-batches between the last two; 0 before the first.
        ignored: whether it has gradients, but never steps.
    """

    optimizer: Any
    at: int = 0
    spacing: int = 0
    ignored: bool = False

    def is_idle(self, handed: int) -> bool:
        """Whether it has nothing to do with the current batches."""
        if self.spacing:
            return handed - self.at > _IDLE_STEPS * self.spacing
        return self.ignored or all(gradient is None for gradient in self.gradients())

    def gradients(self) -> Iterator[Any]:
        """Yield the gradient of each parameter."""
        for group in getattr(self.optimizer, "param_groups", []):
            yield from (one.grad for one in group["params"])

    def has_pending(self) -> bool:
        """Whether it holds gradients that a step may still use; no step uses non-finite ones."""
        held = [_local(one) for one in self.gradients() if one is not None]
        return bool(held) and all(bool(one.isfinite().all()) for one in held)


class Consumption:
    """Counts of one pass after the other, in micro-batches of one rank.

    Attributes:
        handed: handed out in this pass.
        consumed: of these, the ones whose gradients are in the parameters.
        ahead: how many the script requests before it uses them; -1 until that is known.
        steps: optimizer steps of all passes.
        watched: whether optimizer steps can be seen.
        gradients_seen: whether the parameters hold every gradient that a step will use, which a
            plugin may keep elsewhere.
    """

    gradients_seen = False

    def __init__(self) -> None:
        self.watched = False
        self.steps = 0
        self._optimizers: list[_Steps] = []
        self._main: _Steps | None = None
        self._hooks: list[Any] = []
        self._carried = False
        self.handed = 0
        self.begin()

    def watch(self, main: Any, *others: Any) -> None:
        """Count the steps of these optimizers, of which the model's comes first; those without
        hooks are left out."""
        for optimizer in (main, *others):
            inner = inner_optimizer(optimizer)
            known = any(one.optimizer is inner for one in self._optimizers)
            if hasattr(inner, "register_step_post_hook") and not known:
                steps = _Steps(inner)
                self._optimizers.append(steps)
                self._main = steps if optimizer is main else self._main
                self._hooks.append(
                    inner.register_step_post_hook(
                        lambda _, __, ___, steps=steps: self.stepped(steps)
                    )
                )
                self.watched = True

    def unwatch(self) -> None:
        """Take the hooks off the optimizers, which another Session may use."""
        while self._hooks:
            self._hooks.pop().remove()

    def begin(self, accumulation: int = 1) -> None:
        """Begin a pass, in the thread that reads it."""
        self._accumulation = accumulation
        self._reader = threading.get_ident()
        for optimizer in self._optimizers:
            optimizer.at = min(0, optimizer.at - self.handed)
        self.handed = self.consumed = 0
        self.ahead = -1
        self._is_usual = False
        self._used = self._last = self._first_step = 0
        self._exhausted = False

    def exhaust(self) -> None:
        """Note that the script has received the whole pass, and uses all of it."""
        self._exhausted = True

    def end(self) -> None:
        """End a pass. Gradients that no step has used are carried into the next one."""
        self._carried = self.watched and 0 < self.handed != self._last and not self._skipped()
        self.begin()

    def backward(self) -> None:
        """Note a backward pass."""
        self._used = self.handed
        if self.ahead < 0 and self.handed:
            self.ahead = self.handed - 1

    def stepped(self, optimizer: _Steps) -> None:
        """Note a step of an optimizer.

        Raises:
            UsageError: another thread reads the batches, and would save while this one computes.
        """
        self.steps += 1
        handed, used = self.handed, self._used
        if optimizer.at != handed:
            optimizer.spacing, optimizer.at = handed - optimizer.at, handed
        if not self._is_usual:
            if not handed:
                return
            self._check_first(handed)
        if self.ahead >= 0 and (used or self._last != handed):
            self.consumed = (used or handed) - self.ahead
        self._used, self._last = 0, handed

    def ready(self, tries: int) -> bool:
        """Return whether the state is that of :attr:`consumed`, with nothing half done.

        An optimizer stepped since the last hand-out. Of several, all did that are in use; where
        they take turns and never do, their rhythm limits the ``tries``.
        """
        if not self.watched or self._exhausted:
            return True
        if not self.handed:
            return not self._carried
        if self.ahead < 0 or (self._last != self.handed and not self._skip()):
            return False
        waiting = [one for one in self._optimizers if one.at != self.handed]
        waiting = [one for one in waiting if not one.is_idle(self.handed)]
        known = all(one.spacing for one in waiting)
        return not waiting or (known and tries >= 2 * self.spacing)

    def _skip(self) -> bool:
        """Count batches that the script skips as consumed: a bad loss, a scaler's overflow."""
        if not self._skipped():
            return False
        self.consumed, self._used = self.handed, 0
        return True

    def _skipped(self) -> bool:
        """Whether the batches since the last step left nothing that a later step may use."""
        return (
            self.gradients_seen
            and self.ahead == 0
            and not any(one.has_pending() for one in self._optimizers)
        )

    def ignore_stepless(self) -> None:
        """Stop waiting for optimizers that have never stepped."""
        for one in self._optimizers:
            one.ignored = not one.spacing

    @property
    def stepped_since(self) -> bool:
        """Whether an optimizer stepped since the last hand-out."""
        return self.handed > 0 and self._last == self.handed

    @property
    def has_main_stepped(self) -> bool:
        """Whether the model's optimizer stepped with the last batch; False while it is unknown how
        far the script looks ahead."""
        main = self._main
        return main is not None and self.ahead == 0 and 0 < self.handed == main.at

    @property
    def is_half_done(self) -> bool:
        """Whether gradients were computed since the last step; that drew random numbers."""
        return self.counts and self._used > 0

    @property
    def spacing(self) -> int:
        """Micro-batches from one step to the next, at most, of the optimizers in use."""
        used = [one for one in self._optimizers if not one.is_idle(self.handed)]
        return max((one.spacing for one in used), default=0)

    @property
    def counts(self) -> bool:
        """Whether :attr:`consumed` is where the state is, rather than the loop's own count."""
        return self.watched and self.handed > 0 and not self._exhausted

    def _check_first(self, handed: int) -> None:
        """Do what the first steps of a pass need, until it is known how far the script looks
        ahead."""
        self._carried = False
        if self._reader != threading.get_ident():
            raise UsageError(
                "session.batches is read in another thread than the one that trains, which would "
                "save while the model changes: read it in the training thread, and prefetch with "
                "DataLoader(num_workers=..., prefetch_factor=...)"
            )
        self._is_usual = self.ahead >= 0
        if self._is_usual:
            return
        # No backward pass was seen, as with fully_shard: the rhythm of the steps must do.
        if handed <= self._accumulation:
            self.ahead = 0
        elif not self._first_step:
            self._first_step = handed
        elif handed > self._first_step:
            self.ahead = max(0, 2 * self._first_step - handed)


def sample_state(optimizer: Any) -> list[float] | None:
    """Return sums over a few of an optimizer's parameters and of its state; None if it has none.

    They change with each step, also with one that no hook sees, as in a replayed CUDA graph.
    """
    inner = inner_optimizer(optimizer)
    try:
        parameters = [one for group in inner.param_groups for one in group["params"][:4]][:8]
        values = [item for one in parameters for item in (one, *inner.state.get(one, {}).values())]
        return [_sum(value) for value in values] or None
    except (AttributeError, KeyError, TypeError, RuntimeError):
        return None


def _sum(value: Any) -> float:
    if not hasattr(value, "detach"):
        return float(value) if isinstance(value, int | float) else 0.0
    return float(_local(value).reshape(-1)[:4096].double().sum())


def _local(value: Any) -> Any:
    """Return this rank's part of a tensor, dense."""
    local = value.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    return local.coalesce().values() if local.is_sparse else local

"""Optimizers that step the model's parameters, and whose state no checkpoint has."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_post_hook

from elastic_ckpt.training.data.consumption import inner_optimizer
from elastic_ckpt.util.text import printable

_DEPTH: Final = 4
"""How deep a wrapper may hold the optimizers whose state it saves."""


class OtherOptimizers:
    """Says it once if an optimizer that the Session lacks steps parameters of its model.

    A step of the one that it was given costs 0.1 us.
    """

    def __init__(self, model: Any, given: Iterable[Any], say: Callable[[str], None]) -> None:
        """``given`` are the objects whose state the Session saves."""
        self._model = model if isinstance(model, nn.Module) else None
        self._given = list(given)
        self._say = say
        usual = inner_optimizer(self._given[0]) if self._given else None
        seen: set[int] = set()

        def stepped(optimizer: Optimizer, _: Any, __: Any) -> None:
            if optimizer is not usual and id(optimizer) not in seen:
                seen.add(id(optimizer))
                self._look(optimizer)

        self._hook = register_optimizer_step_post_hook(stepped)

    def close(self) -> None:
        """Take the hook off, which is on all optimizers of the process."""
        self._hook.remove()

    def _look(self, optimizer: Optimizer) -> None:
        if self._model is None or _holds(self._given, optimizer):
            return
        names = {id(one): name for name, one in self._model.named_parameters()}
        stepped = [id(one) for group in optimizer.param_groups for one in group["params"]]
        found = [names[one] for one in stepped if one in names]
        if found:
            self._model = None  # one line is enough
            self._say(
                f"warning: {type(optimizer).__name__} steps {len(found)} of the model's parameters "
                f"(first {printable(found[0], 80)}), but the Session was not given it: its state "
                "is in no checkpoint. Keep the first optimizer and change its param_groups, or "
                'add Session(extra={"optimizer2": ...})'
            )


def _holds(thing: Any, optimizer: Optimizer, depth: int = _DEPTH) -> bool:
    """Return whether an object's state contains the optimizer's: it is that, or wraps it."""
    if thing is optimizer:
        return True
    if isinstance(thing, Optimizer) and type(thing).state_dict is Optimizer.state_dict:
        return thing.state is optimizer.state
    if not depth or isinstance(thing, LRScheduler | nn.Module):
        return False
    inside = getattr(thing, "__dict__", thing)
    if isinstance(inside, dict):
        inside = inside.values()
    elif not isinstance(inside, list | tuple):
        return False
    return any(_holds(one, optimizer, depth - 1) for one in list(inside))

"""What a Session is given, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.loaders import has_state
from elastic_ckpt.training.engines import EngineInputs
from elastic_ckpt.training.script.generator import generator_state


def check_extra(extra: Any) -> dict[str, Any]:
    """Return a copy of ``extra``, with random generators wrapped.

    Raises:
        UsageError: it is not a dict of objects that can be saved.
    """
    if not isinstance(extra, Mapping) or not all(isinstance(name, str) for name in extra):
        raise UsageError(f"extra must be a dict of objects by name, not {extra!r:.80}")
    checked = {name: generator_state(thing) or thing for name, thing in extra.items()}
    for name, thing in checked.items():
        if not has_state(thing):
            raise UsageError(
                f"extra[{name!r}] is a {type(thing).__name__}, without state_dict and "
                f"load_state_dict: keep plain values in session.state, as in "
                f"session.state[{name!r}] = ..."
            )
    return checked


def check_inputs(inputs: EngineInputs) -> None:
    """Check model, optimizer and schedule of a script without a booster.

    Raises:
        UsageError: one of them cannot be saved as it is.
    """
    optimizer: Any = inputs.optimizer
    if isinstance(optimizer, Optimizer) and not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise UsageError(
            f"optimizer is a {type(optimizer).__name__}, which wraps the real one: pass that, as "
            "in Session(optimizer=optimizer.optimizer)"
        )
    if inputs.booster is not None:
        return
    for name, thing in (
        ("model", inputs.model), ("optimizer", optimizer), ("lr_scheduler", inputs.lr_scheduler),
    ):  # fmt: skip
        if not has_state(thing) and (thing is not None or name == "model"):
            many = isinstance(thing, list | tuple | dict)
            todo = "put several into one nn.ModuleList" if name == "model" else "pass one"
            raise UsageError(
                f"{name} is a {type(thing).__name__}, without state_dict and load_state_dict"
                + (f": {todo}" if many else "")
            )
    if lazy := _lazy_parameters(inputs.model):
        raise UsageError(
            f"the model's {lazy[0]} has no shape yet, so nothing can be loaded into it: run one "
            "batch through the model before Session(...), as in model(next(iter(loader))[0])"
        )


def _lazy_parameters(model: Any) -> list[str]:
    parameters = model.named_parameters() if isinstance(model, Module) else ()
    return [name for name, one in parameters if is_lazy(one)]

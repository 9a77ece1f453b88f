"""A random generator of the script's own, saved and restored like any other object in ``extra``."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import torch


class GeneratorState:
    """Gives a generator ``state_dict`` and ``load_state_dict``."""

    def __init__(
        self, capture: Callable[[], Any], restore: Callable[[Any], object], kind: str
    ) -> None:
        self._capture = capture
        self._restore = restore
        self._kind = kind

    def state_dict(self) -> dict[str, Any]:
        """Return the state, and of what kind of generator it is."""
        return {"kind": self._kind, "state": self._capture()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Restore a saved state; ValueError if it is that of another kind of generator."""
        if saved.get("kind") != self._kind:
            raise ValueError(f"a {saved.get('kind')} was saved, and the script has a {self._kind}")
        self._restore(saved["state"])


def generator_state(thing: Any) -> GeneratorState | None:
    """Wrap a generator of torch, NumPy or Python; return None for anything else."""
    kind = f"{type(thing).__module__.partition('.')[0]} {type(thing).__name__}"
    if isinstance(thing, torch.Generator):
        return GeneratorState(thing.get_state, thing.set_state, kind)
    if isinstance(thing, random.Random):
        return GeneratorState(thing.getstate, lambda state: _set_python(thing, state), kind)
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(thing, numpy.random.Generator):
        bits = thing.bit_generator
        kind += f" of {type(bits).__name__}"
        return GeneratorState(lambda: bits.state, lambda state: setattr(bits, "state", state), kind)
    if isinstance(thing, numpy.random.RandomState):
        return GeneratorState(thing.get_state, thing.set_state, kind)
    return None


def _set_python(generator: random.Random, state: Any) -> None:
    version, internal, gauss = state
    generator.setstate((version, tuple(internal), gauss))

"""What each process adds to a framework's own checkpoint: values that ``torch.load`` accepts."""

from __future__ import annotations

import io
from typing import Any, Final

import torch

_ARRAY: Final = "array"


def encode(state: dict[str, Any]) -> bytes:
    """Return a process's values as bytes, to collect them."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def decode(data: bytes) -> Any:
    """Reverse :func:`encode`."""
    return torch.load(io.BytesIO(data), weights_only=True)


def plain(value: Any) -> Any:
    """Replace NumPy's arrays, which ``torch.load`` refuses, by tensors."""
    if type(value) is dict:
        return {key: plain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(one) for one in value)
    if type(value).__name__ == "ndarray":
        return {_ARRAY: torch.from_numpy(value.copy())}
    return value


def unplain(value: Any) -> Any:
    """Reverse :func:`plain`."""
    if type(value) is dict:
        if _ARRAY in value:
            return value[_ARRAY].numpy()
        return {key: unplain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(unplain(one) for one in value)
    return value

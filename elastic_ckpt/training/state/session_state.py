"""``session.state``: plain values that a script keeps from run to run, as its best metric."""

from __future__ import annotations

import json
from typing import Any, Final

from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.memory.seal import MemorySeal
from elastic_ckpt.errors import CheckpointRejected, UsageError
from elastic_ckpt.training.state.candidate import Readable
from elastic_ckpt.util.files import read_bounded

FILE: Final = "session_state.json"
MAX_BYTES: Final = 1024 * 1024

_PLAIN: Final = (str, bool, int, float, type(None))


class SessionState(dict[str, Any]):
    """Numbers, strings, bools, None, lists and dicts, by name.

    Rank 0's values are saved with each checkpoint, and every rank receives them on entry.
    """

    def __setitem__(self, name: str, value: Any) -> None:
        """Raise ``UsageError`` unless the value is plain."""
        check_plain(f"session.state[{name!r}]", {name: value})
        super().__setitem__(name, value)

    def encode_if_any(self) -> bytes:
        """Return the values as a checkpoint holds them; empty without any.

        Raises:
            UsageError: one of them is not plain, or they are too large.
        """
        if not self:
            return b""
        for name, value in self.items():  # what is inside a list or a dict was not seen before
            check_plain(f"session.state[{name!r}]", {name: value})
        data = json.dumps(self, indent=1).encode()
        if len(data) > MAX_BYTES:
            raise UsageError(
                f"session.state takes {len(data)} bytes, more than {MAX_BYTES}: keep large values "
                "in an object with state_dict and load_state_dict, and pass it in extra="
            )
        return data

    def resume(self, saved: dict[str, Any]) -> None:
        """Take over a checkpoint's values; the script's others stay."""
        self.update(saved)


def read_session_state(loaded: Readable) -> dict[str, Any]:
    """Return the values in a checkpoint; none if it has no such file.

    Raises:
        CheckpointRejected: they are not readable.
    """
    seal: Manifest | MemorySeal = loaded.seal
    if not any(entry.path == FILE for entry in seal.files):
        return {}
    try:
        found = json.loads(read_bounded(loaded.path / FILE, MAX_BYTES))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointRejected(f"{FILE} in {seal.checkpoint_name} is not readable")
    return found


def check_plain(where: str, value: Any, depth: int = 0) -> None:
    """Raise ``UsageError`` unless JSON gives the value back as it is."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if type(name) is not str:
                raise UsageError(f"{where} has the key {name!r:.40}, but only strings are kept")
            check_plain(where, inner, _deeper(where, depth))
    elif type(value) is list:
        for inner in value:
            check_plain(where, inner, _deeper(where, depth))
    elif type(value) not in _PLAIN:
        raise UsageError(
            f"{where} holds a {type(value).__name__}, but only numbers, strings, bools, None, "
            "lists and dicts are kept: convert it, as in float(loss), or pass an object with "
            "state_dict in extra="
        )


def _deeper(where: str, depth: int) -> int:
    if depth > 50:
        raise UsageError(f"{where} is nested more than 50 levels deep")
    return depth + 1

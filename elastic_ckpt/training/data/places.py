"""The places of loaders in a checkpoint, as ``stream.py`` writes and reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

_KINDS: Final[dict[str, Any]] = {
    "how": str, "epoch": int, "over": bool, "batches": int, "skip": int, "left": bool,
    "rng": dict | None,
}  # fmt: skip


def are_places(found: Any) -> bool:
    """Return whether this is what the streams of one rank have written."""
    return isinstance(found, list) and all(one is None or _is_place(one) for one in found)


def _is_place(one: Any) -> bool:
    return (
        isinstance(one, dict)
        and "state" in one
        and all(isinstance(one.get(name), kind) for name, kind in _KINDS.items())
        and min(one["epoch"], one["batches"], one["skip"], one.get("samples", 0)) >= 0
        and (one["how"] != "order" or isinstance(one.get("samples"), int))
    )


def lost_places(entries: Iterable[dict[str, Any]], before: int, now: int) -> str:
    """Return why the data cannot be resumed exactly; empty if they can.

    Args:
        entries: what :meth:`Stream.entry` returned, of all loaders.
        before, now: ranks at the save, and of this run.
    """
    under_way = [
        one for one in entries if one["batches"] and not one["over"] and one["how"] != "order"
    ]
    if any(one["how"] == "approximate" for one in under_way):
        return 'the data begin anew in this epoch, as position="approximate" says'
    if under_way and before != now:
        return (
            f"{before} ranks saved the places of their loaders, and rank N of {now} resumes with "
            f"that of rank N % {before}: samples of this epoch may be repeated or left out"
        )
    return ""

"""What a script gives its optimizer and schedule, which a checkpoint replaces by its own values."""

from __future__ import annotations

from typing import Any, Final

from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.training.data.consumption import inner_optimizer
from elastic_ckpt.util.text import printable

_DERIVED: Final = frozenset({"params", "initial_lr", "base_lrs", "last_epoch"})
_MAX_SHOWN: Final = 4


def given_settings(optimizer: Any, lr_scheduler: Any) -> dict[str, Any]:
    """Return the plain values of both, as the script has made them."""
    inner = inner_optimizer(optimizer)
    groups = getattr(inner, "param_groups", None)
    schedule = getattr(lr_scheduler, "__dict__", {})
    return {
        "optimizer": type(inner).__name__,
        "groups": [_plain(group) for group in groups] if isinstance(groups, list) else [],
        "schedule": {k: v for k, v in _plain(schedule).items() if not k.startswith("_")},
    }


def replaced_settings(before: Any, now: dict[str, Any], name: str) -> list[str]:
    """Return a line for each kind of value that the script gives differently than it did before it
    saved the checkpoint ``name``.

    Raises:
        CheckpointError: the optimizer is another one, whose state is made of other things.
    """
    if not isinstance(before, dict) or before.keys() != now.keys() or not before.get("groups"):
        return []
    old, new = before["groups"], now["groups"]
    kinds = before["optimizer"], now["optimizer"]
    if kinds[0] != kinds[1] and [set(one) for one in old] != [set(one) for one in new]:
        raise CheckpointError(
            f"the script's optimizer does not fit {name}: it is {kinds[1]} instead of "
            f"{printable(str(kinds[0]), 80)}; use the script that saved it, or start over with a "
            "new --dir"
        )
    changed = {k: v for a, b in zip(old, new, strict=False) for k, v in _changes(a, b).items()}
    return [
        f"the script gives {what} {_shown(changes)}, but the values in {name} count: to change "
        f"them, set {where} after the Session is entered"
        for what, changes, where in (
            ("the optimizer", changed, "optimizer.param_groups[...]"),
            ("lr_scheduler", _changes(before["schedule"], now["schedule"]), "its attributes"),
        )
        if changes
    ]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in _DERIVED and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(one) for one in value)
    return isinstance(value, int | float | str | None)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    common = [key for key in now if key in before]
    return {key: (now[key], before[key]) for key in common if now[key] != before[key]}


def _shown(changes: dict[str, tuple[Any, Any]]) -> str:
    parts = [f"{key}={new!r:.40} instead of {old!r:.40}" for key, (new, old) in changes.items()]
    return printable(", ".join(parts[:_MAX_SHOWN]), 300)

"""What a script gives its optimizer and schedule, which a checkpoint replaces by its own values."""

from __future__ import annotations

from typing import Any, Final

from elastic_ckpt.errors import CheckpointError
from elastic_ckpt.training.data.consumption import inner_optimizer
from elastic_ckpt.util.text import printable

_DERIVED: Final = frozenset({"params", "initial_lr", "base_lrs", "last_epoch"})
_MAX_SHOWN: Final = 4


class ScriptSettings:
    """The plain values of a script's optimizer and schedule.

    Attributes:
        saved: those that the first run gave, which each checkpoint passes on: as long as another
            run gives others, it is told so.
    """

    def __init__(self, optimizer: Any = None, lr_scheduler: Any = None) -> None:
        """Read them as the script has made them, before a checkpoint is loaded."""
        self._optimizer = optimizer
        self._lr_scheduler = lr_scheduler
        self._given = self.saved = self._read()

    def resume(self, before: Any, name: str) -> list[str]:
        """Return a line for each kind of value that the script gives differently than the first
        run did, and that the checkpoint ``name``, which was just loaded, has otherwise.

        Raises:
            CheckpointError: the optimizer is another one, whose state is made of other things.
        """
        given = self._given
        if not isinstance(before, dict) or before.keys() != given.keys() or not before["groups"]:
            return []
        old, new = before["groups"], given["groups"]
        kinds = before["optimizer"], given["optimizer"]
        if kinds[0] != kinds[1] and [set(one) for one in old] != [set(one) for one in new]:
            raise CheckpointError(
                f"the script's optimizer does not fit {name}: it is {kinds[1]} instead of "
                f"{printable(str(kinds[0]), 80)}; use the script that saved it, or start over with "
                "a new --dir"
            )
        self.saved = {
            "optimizer": kinds[1],
            "groups": [*old, *new[len(old) :]],
            "schedule": given["schedule"] | before["schedule"],
        }
        loaded = self._read()
        groups = zip(old, new, loaded["groups"], strict=False)
        changed = {key: one for each in groups for key, one in _changes(*each).items()}
        of_schedule = _changes(before["schedule"], given["schedule"], loaded["schedule"])
        return [
            f"the script gives {what} {_shown(changes)}, but the values in {name} count: to change "
            f"them, set {where} after the Session is entered"
            for what, changes, where in (
                ("the optimizer", changed, "optimizer.param_groups[...]"),
                ("lr_scheduler", of_schedule, "its attributes"),
            )
            if changes
        ]

    def _read(self) -> dict[str, Any]:
        inner = inner_optimizer(self._optimizer)
        groups = getattr(inner, "param_groups", None)
        schedule = getattr(self._lr_scheduler, "__dict__", {})
        return {
            "optimizer": type(inner).__name__,
            "groups": [_plain(group) for group in groups] if isinstance(groups, list) else [],
            "schedule": {k: v for k, v in _plain(schedule).items() if not k.startswith("_")},
        }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in _DERIVED and _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(one) for one in value)
    return isinstance(value, int | float | str | None)


def _changes(
    before: dict[str, Any], given: dict[str, Any], loaded: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return what is given and what was, by name, unless it is what counts in any case."""
    common = [key for key in given if key in before and given[key] != loaded.get(key)]
    return {key: (given[key], before[key]) for key in common if given[key] != before[key]}


def _shown(changes: dict[str, tuple[Any, Any]]) -> str:
    parts = [f"{key}={new!r:.40} instead of {old!r:.40}" for key, (new, old) in changes.items()]
    return printable(", ".join(parts[:_MAX_SHOWN]), 300)

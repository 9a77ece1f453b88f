"""Objects that other packages register by name, as entry points."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

from elastic_ckpt.errors import UsageError


def plugin_names(group: str, built_in: Mapping[str, str]) -> list[str]:
    """Return the built-in names, then those that installed packages register in the group."""
    return [*built_in, *sorted(_registered(group).keys() - built_in.keys())]


def load_plugin(kind: str, name: str, group: str, built_in: Mapping[str, str]) -> Any:
    """Import the object that is registered under a name; a built-in one takes precedence.

    Args:
        kind: what the group holds, for messages, for example ``engine``.
        group: the entry point group.
        built_in: ``module:attribute`` by name.

    Raises:
        UsageError: nothing is registered under the name, or importing it fails.
    """
    target = built_in.get(name) or _registered(group).get(name)
    if target is None:
        raise UsageError(
            f"unknown {kind} {name!r}; available: {', '.join(plugin_names(group, built_in))}. "
            f"To add one, install a package with an entry point in the group {group}"
        )
    try:
        return pkgutil.resolve_name(target)
    except Exception as error:  # importing runs any code
        raise UsageError(
            f"cannot import the {kind} {name!r} from {target}: {type(error).__name__}: {error}; "
            "fix or reinstall the package that provides it"
        ) from error


def _registered(group: str) -> dict[str, str]:
    from importlib.metadata import entry_points  # reads the metadata of every installed package

    return {entry.name: entry.value for entry in entry_points(group=group)}

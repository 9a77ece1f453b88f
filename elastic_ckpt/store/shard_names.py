"""The files that an index of ColossalAI's layout speaks of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elastic_ckpt.core.manifest import MAX_MANIFEST_BYTES, check_path
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.store.files import read_bounded


def shard_names(index: Path) -> list[str]:
    """Their names, relative to the index; none of them leads out.

    Raises:
        CheckpointRejected: it is not readable, or names what is no path in the checkpoint.
    """
    try:
        names = _named(json.loads(read_bounded(index, MAX_MANIFEST_BYTES)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointRejected(f"{index.parent.name}/{index.name} is not readable") from None
    for name in names:
        check_path(name)
    return names


def _named(content: Any) -> list[str]:
    if not isinstance(content, dict):
        return []
    names = [*content.get("weight_map", {}).values()]
    group = content.get("metadata", {}).get("param_groups")
    if group is not None:
        names.append(group)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a file's name is no text")
    return names

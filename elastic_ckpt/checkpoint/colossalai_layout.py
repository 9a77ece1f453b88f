"""What an index of ColossalAI's layout speaks of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_ckpt.checkpoint.manifest import MAX_MANIFEST_BYTES, check_path
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import read_bounded


@dataclass(frozen=True)
class Index:
    """One index file.

    Attributes:
        entries: the names of parameters, or the numbers of an optimizer's.
        files: the files' names, relative to the index; none of them leads out.
    """

    entries: frozenset[str]
    files: list[str]


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        CheckpointRejected: it is not readable, or names what is no path in the checkpoint.
    """
    try:
        index = _decode(json.loads(read_bounded(path, MAX_MANIFEST_BYTES)))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointRejected(f"{path.parent.name}/{path.name} is not readable") from None
    for name in index.files:
        check_path(name)
    return index


def _decode(content: Any) -> Index:
    if not isinstance(content, dict):
        return Index(frozenset(), [])
    entries = content.get("weight_map", {})
    names = [*entries.values()]
    group = content.get("metadata", {}).get("param_groups")
    if group is not None:
        names.append(group)
    if not all(isinstance(name, str) for name in names):
        raise TypeError("a file's name is no text")
    return Index(frozenset(entries), names)

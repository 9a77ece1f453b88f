"""The text of a release's tag, from the change log.

python -m scripts.release.tag | git tag -a v0.2.0 -F -
"""

from __future__ import annotations

import re
from pathlib import Path

import elastic_ckpt

CHANGES = Path(__file__).resolve().parents[2] / "CHANGELOG.md"
_HEAD = re.compile(r"^## (\S+) \((\d{4}-\d{2}-\d{2})\)$", re.MULTILINE)


def tag_text(changes: str, version: str) -> str:
    """Return the newest section of the change log as plain text.

    Raises:
        ValueError: it is of another version, or has no date.
    """
    first = re.search(r"^## .*$", changes, re.MULTILINE)
    head = _HEAD.match(changes, first.start()) if first else None
    if head is None or head[1] != version:
        raise ValueError(f"CHANGELOG.md does not begin with '## {version} (YYYY-MM-DD)'")
    section = re.split(r"^## ", changes[head.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", section.strip()).replace("`", "")
    return f"elastic-ckpt {version}, {head[2]}\n\n{plain}\n"


if __name__ == "__main__":
    print(tag_text(CHANGES.read_text(encoding="utf-8"), elastic_ckpt.__version__), end="")

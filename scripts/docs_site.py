"""Lay out the pages of the documentation's site, from which ``make docs`` builds it.

    python scripts/docs_site.py build/docs

The change log and the guide for contributors stand in the repository's root and become pages, too.
Other files of the repository are not on the site: a link to one becomes its text.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FROM_THE_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
_FENCE = re.compile(r"^```(\w+) (\S.*)$", re.MULTILINE)
_LEADS_OUT = re.compile(r"\[([^\]]*)\]\((?:\.\./|schemas/)[^)]*\)")


def page(text: str) -> str:
    """Return a page of docs/ as the site has it."""
    for name in FROM_THE_ROOT:
        text = text.replace(f"](../{name}", f"]({name}")
    text = _FENCE.sub(r'```\1 title="\2"', text)  # what a block is called, as this site writes it
    return _LEADS_OUT.sub(r"\1", text)


def main(out: Path) -> None:
    """Write all pages, in place of what was there."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out, ignore=shutil.ignore_patterns("schemas"))
    for name in FROM_THE_ROOT:
        text = (ROOT / name).read_text(encoding="utf-8")
        (out / name).write_text(text.replace("](docs/", "]("), encoding="utf-8")
    for path in out.glob("*.md"):
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

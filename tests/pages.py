"""The Markdown pages, taken apart: blocks, links, headings, and what a page has one type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md"])

_LINK = re.compile(r"(?<!\\)\[[^\]]*\]\(\s*<?([^)>\s]+)>?[^)]*\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the rest of its first line, its text, its line number."""

    language: str
    name: str
    text: str
    line: int


@dataclass(frozen=True)
class Step:
    """A command of a console block, and what stands below it."""

    command: str
    output: tuple[str, ...]


def blocks(page: Path) -> list[Block]:
    """Return the page's fenced blocks, in order."""
    found = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened, begin = "", 0
    for number, line in enumerate(lines):
        mark = re.match(r" *(`{3,}|~{3,})(.*)", line)
        if not opened and mark:
            opened, begin, info = mark[1], number, mark[2].split()
        elif opened and mark and mark[1].startswith(opened) and not mark[2].strip():
            text = "\n".join(lines[begin + 1 : number])
            found.append(Block(info[0] if info else "", " ".join(info[1:]), f"{text}\n", begin + 1))
            opened = ""
    assert not opened, f"{page.name}:{begin + 1}: a fence is not closed"
    return found


def prose(page: Path) -> str:
    """Return the page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^ *(`{3,})[^\n]*\n.*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def steps(block: Block) -> Iterator[Step]:
    """Yield the commands after ``$ `` in a console block, each with its output lines."""
    command, output = None, []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            if command is not None:
                yield Step(command, tuple(output))
            command, output = line[2:], []
        else:
            output.append(line)
    if command is not None:
        yield Step(command, tuple(output))


def links(page: Path) -> list[str]:
    """Return the targets of links and pictures outside of code."""
    return _LINK.findall(_CODE.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """Return the fragments of its headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(prose(page)):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        base = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = found.get(base, 0)
        found[base] = count + 1
        names.add(f"{base}-{count}" if count else base)
    return names


def typed_commands(page: Path) -> list[str]:
    """Return all commands that begin with ``elastic-ckpt``, inline or in blocks."""
    text = prose(page)
    pieces = [code for _, code in _CODE.findall(text)]
    for block in blocks(page):
        if block.language not in ("python", "diff", "json"):
            pieces += re.sub(r"\\\n\s*", " ", block.text).splitlines()
    found = []
    for piece in pieces:
        line = " ".join(piece.split())
        for at in re.finditer(r"(?:^|[\s(])elastic-ckpt (?=[a-z-])", line):
            found.append(line[at.start() :].strip(" ("))
    return found

"""The pages match the code: links, options, variables, the generated reference, the diagrams."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest

from elastic_ckpt.errors import ExitCode
from elastic_ckpt.protocol.run_state import TRANSITIONS
from tests.commands import COMMANDS, PROGRAM
from tests.pages import DOCS, PAGES, ROOT, anchors, blocks, links, typed_commands

sys.path.insert(0, str(ROOT / "scripts"))
import docs_site
import reference

pytestmark = pytest.mark.one_torch
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

INTERNAL = {
    # between our processes
    "ELASTIC_CKPT_EVENTS", "ELASTIC_CKPT_SOCKETS", "ELASTIC_CKPT_SCRATCH", "ELASTIC_CKPT_LEARNED",
    "HOME", "PYTHONWARNINGS", "WATCHDOG_PID", "INVOCATION_ID",
}  # fmt: skip
DIAGRAMS = ("flowchart", "sequenceDiagram", "stateDiagram-v2")


@each_page
def test_links_resolve(page: Path) -> None:
    """To a file, and to a heading in it."""
    lost = []
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, fragment = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT))
)
def test_named_paths_exist(page: Path) -> None:
    assert missing_paths(page.read_text(encoding="utf-8")) == []


def missing_paths(text: str) -> list[str]:
    """Return paths in inline code that are neither in the repository nor in the package."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    roots = (ROOT, ROOT / "elastic_ckpt")
    folders = {path.name for root in roots for path in root.iterdir() if path.is_dir()}
    named = re.findall(r"`([\w.-]+/[\w./-]*)`", prose)
    return [
        path
        for path in named
        if path.partition("/")[0] in folders and not any((root / path).exists() for root in roots)
    ]


def test_a_missing_path_is_found() -> None:
    """The test above can fail."""
    text = "`policy/restart.py`, `tests/unit/`, `tests/nowhere.py`, `cli/nothing/`, `a/b`"
    assert missing_paths(text) == ["tests/nowhere.py", "cli/nothing/"]


@each_page
def test_commands_and_options_exist(page: Path) -> None:
    """Yield every command line of ``elastic-ckpt`` on a page."""
    wrong = [
        f"{typed}: {problem}"
        for typed in typed_commands(page)
        if (problem := what_is_wrong_with(typed))
    ]
    assert wrong == []


def what_is_wrong_with(typed: str) -> str:
    """Empty if the command exists, and has each option before ``--``, a script or a module."""
    words = re.sub(r"[\[\]()]|\\\|", " ", typed).split()[1:]
    name, command = PROGRAM, COMMANDS[PROGRAM]
    while isinstance(command, click.Group):
        if not words or words[0].isupper():  # stands for any of them
            return ""
        name = f"{name} {words[0]}"
        if name not in COMMANDS:
            return f"there is no {name}"
        command, words = COMMANDS[name], words[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help", "-h"}
    for word in words:
        if word in ("--", "#", "&&", "|", ">", "->", "-m") or word.endswith(".py"):
            break
        option = word.partition("=")[0].rstrip(",.;:`")
        if re.fullmatch(r"--?[a-z][a-z-]*", option) and option not in known:
            return f"{name} has no {option}"
    return ""


def test_unknown_option_is_found() -> None:
    """The test above can fail."""
    assert what_is_wrong_with("elastic-ckpt run --dir x --nprocs 2 -- train.py")
    assert what_is_wrong_with("elastic-ckpt slurm submitted job.toml")
    assert what_is_wrong_with("elastic-ckpt lists")
    for end in ("-- train.py", "train.py", "-m train"):
        assert not what_is_wrong_with(f"elastic-ckpt run --dir x --nproc 2 {end} --nprocs 2")


def test_every_page_is_in_the_index() -> None:
    """So that every page can be found."""
    linked = {link.partition("#")[0] for link in links(DOCS / "README.md")}
    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} <= linked


def test_every_page_is_on_the_site() -> None:
    """In one place; the order is that of what people want to do."""
    config = msgspec.toml.decode((ROOT / "zensical.toml").read_bytes())

    def names(part: Any) -> Iterator[str]:
        for one in part:
            yield from [one] if isinstance(one, str) else names(next(iter(one.values())))

    listed = sorted(names(config["project"]["nav"]))
    assert listed == sorted([*(page.name for page in DOCS.glob("*.md")), *docs_site.FROM_THE_ROOT])


def test_links_that_leave_the_site_become_their_text() -> None:
    text = "see [the units](../systemd/README.md), [changes](../CHANGELOG.md#x), [it](nodes.md)"
    expected = "see the units, [changes](CHANGELOG.md#x), [it](nodes.md)"
    assert docs_site.page(text) == expected
    assert docs_site.page("```diff a.py b.py\n```\n") == '```diff title="a.py b.py"\n```\n'


def test_reference_matches_the_sources() -> None:
    """``python scripts/reference.py`` makes it; run that when an option changes."""
    assert (DOCS / "reference.md").read_text(encoding="utf-8") == reference.reference()


def test_reference_is_built_without_torch() -> None:
    """It is the same on every version of torch, and quickly made."""
    done = subprocess.run(
        [sys.executable, "-c", "import reference, sys; reference.reference(); print(*sys.modules)"],
        cwd=ROOT / "scripts", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert not {"torch", "colossalai"} & set(done.stdout.split())


def test_reference_lists_every_exit_code() -> None:
    """Every variable has a description."""
    assert set(reference.CODES) == set(ExitCode)


def test_reference_lists_every_variable() -> None:
    """Or it is one between our own processes."""
    page = (DOCS / "reference.md").read_text(encoding="utf-8")
    read = set()
    for source in (ROOT / "elastic_ckpt").rglob("*.py"):
        text = source.read_text(encoding="utf-8")
        read |= set(re.findall(r"environ(?:\.\w+\(|\[)\"([A-Z][A-Z_0-9]+)\"", text))
        read |= set(re.findall(r"getenv\(\"([A-Z_0-9]+)\"", text))
    assert "ELASTIC_CKPT_DIR" in read
    assert {name for name in read if f"`{name}`" not in page} <= INTERNAL


def test_state_table_matches_the_code() -> None:
    """``python scripts/reference.py`` draws them; and each transition is an arrow."""
    page = (DOCS / "design.md").read_text(encoding="utf-8")
    assert page == reference.with_states(page)
    drawn = page.partition(reference.BEGIN)[2].partition(reference.END)[0]
    for (before, event), after in TRANSITIONS.items():
        names = [one.name if "-" in one.value else one.value for one in (before, after)]
        assert re.search(rf"{names[0]} --> {names[1]}: .*\b{event.value}\b", drawn), (before, event)


def test_diagrams_are_balanced() -> None:
    """Check diagrams without a browser: a known kind, every bracket and block closed."""
    drawn = [block for block in blocks(DOCS / "design.md") if block.language == "mermaid"]
    assert len(drawn) == 4
    for block in drawn:
        assert block.text.split()[0] in DIAGRAMS
        for opened, closed in ("()", "[]", "{}"):
            assert block.text.count(opened) == block.text.count(closed), block.line
        assert block.text.count('"') % 2 == 0, block.line
        opened = re.findall(r"^ *(?:subgraph|par|alt|loop) ", block.text, re.MULTILINE)
        assert len(opened) == len(re.findall(r"^ *end$", block.text, re.MULTILINE)), block.line
        if block.text.startswith("flowchart"):
            known = set(
                re.findall(
                    r"^ *(\w+)[\[({]|(?:-->|-\.->)(?:\|[^|]*\|)? *(\w+)[\[({]",
                    block.text,
                    re.MULTILINE,
                )
            )
            ends = set(re.findall(r"^ *(\w+) (?:<?-->|-\.->)", block.text, re.MULTILINE))
            assert ends <= {name for pair in known for name in pair}, block.line

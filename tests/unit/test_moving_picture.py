"""The README's moving picture: complete in itself, small, and readable in every setting."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from scripts.moving_picture import MAX_WAIT_SECONDS, Line, draw, kind, shortened

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "killed.svg"
LINES = [
    Line(0.0, "$ elastic-ckpt run --dir ckpt --nproc 2 train.py"),
    Line(9.0, "step   10  loss <1> & 2"),
    Line(10.0, "step   60  loss 5.1"),
    Line(10.0, "$ kill -9 7", is_typed=True),
    Line(10.2, "elastic-ckpt: rank 1 failed: killed by SIGKILL: restarting"),
    Line(10.7, "elastic-ckpt: training, incarnation 2, from step 50"),
    Line(10.8, "step   50  loss 4.2"),
    Line(12.0, "x" * 100),
    Line(13.0, "elastic-ckpt: finished"),
]

pytestmark = pytest.mark.one_torch


@pytest.mark.parametrize("text", [PICTURE.read_text(), draw(LINES)], ids=["shown", "drawn"])
def test_it_is_complete_in_itself(text: str) -> None:
    found = ElementTree.fromstring(text)
    tags = {one.tag.rpartition("}")[2] for one in found.iter()}
    assert tags <= {"svg", "title", "style", "rect", "path", "text", "g"}
    names = {name for one in found.iter() for name in one.attrib}
    assert not {name for name in names if name.startswith("on") or "href" in name}
    rest = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"url\(|@import|@font-face|https?:|//|javascript:|<!ENTITY", rest)


def test_it_is_small_and_heeds_the_readers_settings() -> None:
    text = PICTURE.read_text()
    assert len(text.encode()) <= 60_000
    assert "@media (prefers-reduced-motion: reduce)" in text
    assert "@media (prefers-color-scheme: dark)" in text
    for theme in (text.partition("@media (prefers-color-scheme")[0], text):
        for name in ("back", "run", "bad", "good", "bar"):
            assert f".{name} {{" in theme


def test_it_shows_a_kill_and_the_same_losses_after_it() -> None:
    shown = [one.text or "" for one in ElementTree.fromstring(PICTURE.read_text()).iter()]
    at = next(number for number, text in enumerate(shown) if "kill -9" in text)
    before, after = shown[:at], shown[at:]
    assert any("killed by SIGKILL: restarting" in text for text in after)
    assert any(re.search(r"incarnation 2, from step \d+", text) for text in after)
    steps = [text for text in after if text.startswith("step ")]
    repeated = [text for text in steps if text.split()[1] in ("50", "60")]
    assert repeated and set(repeated) <= set(before)


def test_the_readme_shows_it_within_its_limit() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert any("(docs/killed.svg)" in line for line in lines[:15])


def test_long_waits_are_shortened_and_short_ones_kept() -> None:
    assert list(shortened([0.0, 9.0, 9.5])) == [0.0, MAX_WAIT_SECONDS, MAX_WAIT_SECONDS + 0.5]


def test_lines_are_told_apart() -> None:
    kinds = [kind(line) for line in LINES]
    assert kinds == ["type", "out", "out", "bad", "bad", "good", "out", "out", "good"]

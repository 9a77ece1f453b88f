"""What the replay of a recorded disk keeps, on a log that is made by hand."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from tests.power_cuts.log import PAGE_BYTES, Disk, Log

pytestmark = pytest.mark.one_torch

FLUSH, FUA, MARK = 1, 2, 8
SIZE = 8 * PAGE_BYTES


def written(path: Path, *entries: tuple[int, int, bytes]) -> Log:
    """Write a log of (flags, page, data), in the kernel's format."""
    body = b""
    for flags, page, data in entries:
        sector = page * PAGE_BYTES // 512
        head = struct.pack("<QQQQ", sector, len(data) // 512, flags, len(data))
        if flags & MARK:
            body += (head + data).ljust(512, b"\0")
        else:
            body += head.ljust(512, b"\0") + data
    start = struct.pack("<QQQI", 0x6A736677736872, 1, len(entries), 512)
    path.write_bytes(start.ljust(512, b"\0") + body)
    return Log.read(path)


def page(letter: bytes) -> bytes:
    return letter * PAGE_BYTES


def after(log: Log, scratch: Path, position: int, dice: random.Random | None) -> str:
    """Return the first letter of each page of a disk that was full of dots."""
    base, image = scratch / "base", scratch / "image"
    base.write_bytes(b"." * SIZE)
    disk = Disk(log, base)
    try:
        disk.cut(position, dice, image)
    finally:
        disk.close()
    found = image.read_bytes()
    assert len(found) == SIZE
    return "".join(chr(found[at]) for at in range(0, SIZE, PAGE_BYTES))


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return written(
        tmp_path / "log",
        (0, 0, page(b"a")),
        (0, 1, page(b"b") + page(b"c")),
        (FLUSH, 0, b""),
        (MARK, 0, b"sealed:10"),
        (0, 3, page(b"d") + page(b"e")),
        (FUA, 5, page(b"f")),
        (FLUSH, 6, page(b"g")),
    )


def test_marks_and_flushes_are_read(log: Log) -> None:
    assert (log.marks, log.flushes) == ([(3, "sealed:10")], 2)


def test_what_is_kept_in_full(log: Log, tmp_path: Path) -> None:
    kept = [after(log, tmp_path, position, None) for position in range(len(log.entries))]
    assert kept == [
        "a.......", "abc.....", "abc.....", "abc.....", "abcde...", "abcdef..", "abcdefg.",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("position", "possible"),
    [
        (1, {f"{a}{b}{c}....." for a in "a." for b in "b." for c in "c."}),
        (2, {"abc....."}),
        (3, {"abc....."}),
        (4, {"abc.....", "abcd....", "abc.e...", "abcde..."}),
        (5, {"abc..f..", "abcd.f..", "abc.ef..", "abcdef.."}),
        (6, {"abcdef..", "abcdefg."}),
    ],
)
def test_what_was_not_flushed_is_lost_or_torn_and_nothing_else(
    log: Log, tmp_path: Path, position: int, possible: set[str]
) -> None:
    found = {after(log, tmp_path, position, random.Random(seed)) for seed in range(200)}
    assert found == possible

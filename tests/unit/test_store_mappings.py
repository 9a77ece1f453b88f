"""A mapping is kept while its file is one of those that are written in turn."""

from __future__ import annotations

import os
from pathlib import Path

from elastic_ckpt.store.mapped import MAPPED_FROM_BYTES, Mappings

SIZE = 2 * MAPPED_FROM_BYTES


def write(mappings: Mappings, path: Path, fill: bytes) -> None:
    file = mappings.open(path, SIZE)
    try:
        file.write(fill * SIZE)
        assert file.finish() == SIZE
    finally:
        file.close()


def mapped_at(path: Path) -> list[str]:
    """Address ranges; another mapping of the file would have another one, or be in its place."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            found.append(line.split()[0])
    return found


def test_files_that_are_written_in_turn_stay_mapped(tmp_path: Path) -> None:
    """As those of two generations; the first touch of a mapping costs as much as the copy."""
    mappings, places = Mappings(), (tmp_path / "a", tmp_path / "b")
    for number in range(6):
        place = places[number % 2]
        before = mapped_at(place)
        write(mappings, place, bytes([number]))
        mappings.forget_unused()
        if number >= 2:
            assert before and mapped_at(place) == before
        assert place.read_bytes() == bytes([number]) * SIZE


def test_a_file_that_is_not_written_any_more_is_let_go(tmp_path: Path) -> None:
    mappings = Mappings()
    write(mappings, tmp_path / "old", b"x")
    mappings.forget_unused()
    os.unlink(tmp_path / "old")
    for name in "abab":
        write(mappings, tmp_path / name, b"y")
        mappings.forget_unused()
    assert "old" not in Path("/proc/self/maps").read_text()

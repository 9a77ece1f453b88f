"""Bells that changes of a directory ring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.util.change_bell import ChangeBell


@pytest.fixture
def bell(tmp_path: Path) -> Iterator[ChangeBell]:
    (tmp_path / "it").mkdir()
    bell = ChangeBell(tmp_path / "it")
    assert bell.is_on and not bell.rang()
    yield bell
    bell.close()


def test_each_change_rings_once(bell: ChangeBell, tmp_path: Path) -> None:
    file = tmp_path / "it" / "a"
    for change in (
        file.touch,
        lambda: file.write_text("more"),
        lambda: file.rename(tmp_path / "it" / "b"),
        lambda: (tmp_path / "it" / "b").unlink(),
    ):
        change()
        assert bell.rang() and not bell.rang()


def test_directory_that_was_made_again_rings(bell: ChangeBell, tmp_path: Path) -> None:
    (tmp_path / "it").rmdir()
    assert bell.rang() and not bell.is_on
    assert bell.rang() and not bell.is_on  # nothing is there: whoever asks has to look
    (tmp_path / "it").mkdir()
    assert bell.rang() and bell.is_on and not bell.rang()
    (tmp_path / "it" / "a").touch()
    assert bell.rang()


def test_bell_is_hung_again_where_a_parent_was_moved(bell: ChangeBell, tmp_path: Path) -> None:
    (tmp_path / "it").rename(tmp_path / "old")
    (tmp_path / "it").mkdir()
    bell.hang()
    bell.rang()
    (tmp_path / "it" / "a").touch()
    assert bell.rang()


def test_many_changes_ring(bell: ChangeBell, tmp_path: Path) -> None:
    """More than one read takes, and more than the kernel keeps."""
    for number in range(20_000):
        (tmp_path / "it" / f"{'long' * 20}-{number}").touch()
    for _ in range(1000):
        if not bell.rang():
            break
    assert not bell.rang()
    (tmp_path / "it" / "last").touch()
    assert bell.rang()


def test_host_without_inotify_always_rings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChangeBell, "hang", lambda bell: None)
    bell = ChangeBell(tmp_path)
    assert bell.rang() and bell.rang()
    bell.close()
    bell.close()

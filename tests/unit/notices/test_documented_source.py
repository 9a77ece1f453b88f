"""The notice source that CONTRIBUTING.md shows how to add, as a user selects it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.notices.platforms import choose, make_sources, source_names
from elastic_ckpt.notices.signals import SignalSource
from elastic_ckpt.policy.deadline import Notice
from elastic_ckpt.supervisor.listener import Listener
from tests.checkpoints import open_job
from tests.contributing import install_example


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    install_example("Adding a notice source", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("MAINTENANCE_FILE", str(tmp_path / "maintenance"))
    yield tmp_path / "maintenance"
    sys.modules.pop("my_sources", None)


def test_its_notice_reaches_the_supervisors_listener(installed: Path, tmp_path: Path) -> None:
    [source] = make_sources(choose(["maintenance"]))
    woken = threading.Event()
    signals = SignalSource(30.0)
    signals.start = lambda report: None  # type: ignore[method-assign]
    listener = Listener(signals, [source], Journal(open_job(tmp_path / "job"), "a"), woken.set)
    listener.start(time.monotonic())
    try:
        installed.touch()
        assert woken.wait(20)
        [notice] = listener.take_in(time.monotonic(), lambda: 10.0)
    finally:
        source.stop()
    assert isinstance(notice, Notice)
    assert (notice.source, notice.reason) == ("maintenance", "planned maintenance")


def test_it_is_among_the_available_names(installed: Path) -> None:
    assert "maintenance" in source_names()
    with pytest.raises(UsageError, match=r"'maintenanse'; available: auto, .*, maintenance\. To"):
        choose(["maintenanse"])


def test_a_package_that_registers_something_else_is_named(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("my_sources.MaintenanceSource", dict)
    with pytest.raises(UsageError, match="'maintenance' is a dict, which does not derive from"):
        make_sources(["maintenance"])


def test_a_package_that_cannot_be_imported_is_named(installed: Path) -> None:
    (installed.parent / "my_sources.py").write_text("import a_module_that_is_missing\n")
    with pytest.raises(UsageError, match="my_sources:MaintenanceSource: ModuleNotFoundError"):
        make_sources(["maintenance"])

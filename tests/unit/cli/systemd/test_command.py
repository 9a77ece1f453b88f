"""Installing and removing units in a directory that stands for the system's root."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from elastic_ckpt.cli.systemd import command as cli
from elastic_ckpt.cli.systemd.units import hidden_by, system_files
from elastic_ckpt.errors import UnitsRefused

UNIT = "etc/systemd/system/elastic-ckpt@.service"
ALL = [UNIT, "etc/sysusers.d/elastic-ckpt.conf", "etc/tmpfiles.d/elastic-ckpt.conf"]
SOURCE = Path(__file__).parents[4] / "systemd"


def call(*words: object) -> Result:
    return CliRunner().invoke(cli.command, list(map(str, words)), catch_exceptions=False)


def installed(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The directory of an installation whose path needs quoting in a unit."""
    made = tmp_path / 'of "50 %"' / "bin"
    made.mkdir(parents=True)
    (made / "elastic-ckpt").touch(0o755)
    monkeypatch.setattr("sys.executable", str(made / "python3"))
    return made


def test_install_writes_the_files_of_the_source_with_the_path_of_the_program(
    program: Path, tmp_path: Path
) -> None:
    found = call("install", "--root", tmp_path / "root")
    assert found.exit_code == 0
    assert installed(tmp_path / "root") == sorted(ALL)
    shown = (tmp_path / "root" / UNIT).read_text().splitlines()
    source = (SOURCE / "elastic-ckpt@.service").read_text().splitlines()
    differing = [line for line in shown if line not in source]
    path = str(program).replace('"', '\\"').replace("%", "%%")
    assert differing == [shown[0], f'Environment="PATH={path}:/usr/local/bin:/usr/bin:/bin"']
    assert (tmp_path / "root" / UNIT).stat().st_mode & 0o777 == 0o644
    for name, path in zip(("sysusers", "tmpfiles"), ALL[1:], strict=True):
        text = (tmp_path / "root" / path).read_text()
        assert text.partition("\n")[2] == (SOURCE / f"elastic-ckpt.{name}").read_text()
    assert "systemd-sysusers --root=" in found.output


def test_second_install_changes_nothing_and_says_so(program: Path, tmp_path: Path) -> None:
    call("install", "--root", tmp_path / "root")
    before = (tmp_path / "root" / UNIT).stat().st_mtime_ns
    assert call("install", "--root", tmp_path / "root").output.count("is up to date") == 3
    assert (tmp_path / "root" / UNIT).stat().st_mtime_ns == before


def test_another_version_is_replaced_and_a_changed_file_is_not(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic_ckpt.cli.systemd.units.__version__", "0.0.1")
    call("install", "--root", tmp_path / "root")
    monkeypatch.undo()
    monkeypatch.setattr("sys.executable", str(program / "python3"))
    assert call("install", "--root", tmp_path / "root").output.count("replaces") == 3
    unit = tmp_path / "root" / UNIT
    changed = unit.read_text().replace("WatchdogSec=5min", "WatchdogSec=9min")
    unit.write_text(changed)
    for verb in ("install", "uninstall"):
        with pytest.raises(UnitsRefused, match=f"changed since installed: {unit}; keep changes"):
            call(verb, "--root", tmp_path / "root")
        assert installed(tmp_path / "root") == sorted(ALL)
        assert unit.read_text() == changed
    assert call("install", "--force", "--root", tmp_path / "root").exit_code == 0
    assert "WatchdogSec=5min" in unit.read_text()


def test_unit_copied_by_hand_as_it_was_is_replaced(program: Path, tmp_path: Path) -> None:
    unit = tmp_path / "root" / UNIT
    unit.parent.mkdir(parents=True)
    [wanted, *_] = system_files(tmp_path / "root", program)
    unit.write_bytes(wanted.data.partition(b"\n")[2])
    assert call("install", "--root", tmp_path / "root").exit_code == 0


def test_dry_run_writes_nothing(program: Path, tmp_path: Path) -> None:
    found = call("install", "--dry-run", "--root", tmp_path / "root")
    assert found.output.count("would write") == 3 and installed(tmp_path) == installed(tmp_path)
    assert not (tmp_path / "root").exists()


def test_unit_of_a_package_is_not_hidden(program: Path, tmp_path: Path) -> None:
    packaged = tmp_path / "root/usr/lib/systemd/system/elastic-ckpt@.service"
    packaged.parent.mkdir(parents=True)
    packaged.touch()
    with pytest.raises(UnitsRefused, match="a package has installed"):
        call("install", "--root", tmp_path / "root")


def test_uninstall_removes_what_install_wrote_and_names_what_is_enabled(
    program: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    call("install", "--root", root)
    job = root / "etc/elastic-ckpt/gpt.toml"
    job.parent.mkdir()
    job.touch()
    wants = root / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir()
    (wants / "elastic-ckpt@gpt.service").symlink_to(root / UNIT)
    found = call("uninstall", "--root", root)
    assert found.output.count("removed") == 3
    assert "*.wants/elastic-ckpt@gpt.service" in found.output
    assert installed(root) == ["etc/elastic-ckpt/gpt.toml"]
    assert "not installed" in call("uninstall", "--root", root).output


def test_user_scope_is_the_users_own_configuration(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    found = call("install", "--user")
    assert installed(tmp_path / "config") == ["systemd/user/elastic-ckpt@.service"]
    assert "systemctl --user daemon-reload" in found.output and "enable-linger" in found.output
    text = (tmp_path / "config/systemd/user/elastic-ckpt@.service").read_text()
    assert "User=" not in text and "%E/elastic-ckpt/%i.toml" in text
    assert call("install", "--user", "--root", tmp_path).exit_code == 2


def test_unwritable_place_names_both_ways_out(program: Path, monkeypatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(UnitsRefused, match="run it as root, or with --user"):
        call("install", "--root", tmp_path / "root")


def test_place_that_other_users_may_not_pass_is_found(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "bin").mkdir(mode=0o755)
    assert hidden_by(closed / "bin") == closed


def test_every_setting_that_doctor_requires_is_in_both_units() -> None:
    from elastic_ckpt.cli.doctor.systemd_unit import _MUST

    for unit in ("elastic-ckpt@.service", "user/elastic-ckpt@.service"):
        text = (SOURCE / unit).read_text().splitlines()
        lines = dict(line.split("=", 1) for line in text if "=" in line and line[0] != "#")
        for name, (wanted, _) in _MUST.items():
            assert lines.get(name, "no") == wanted, (unit, name)

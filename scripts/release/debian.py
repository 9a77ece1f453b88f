"""The Debian package: the wheel and what a supervisor needs, in a directory of their own.

    python -m scripts.release.debian dist/elastic_ckpt-0.2.0-py3-none-any.whl dist

``/opt/elastic-ckpt`` is a virtual environment over the system's Python, with the packages of
requirements/service.txt. torch is not in it: a job names its own Python. Needs dpkg-deb, and a
python3 of the system that the package is for.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from pathlib import Path

from scripts.release.sbom import bill

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "systemd"
PYTHON = "/usr/bin/python3"
HOME = "opt/elastic-ckpt"

PLACES = {
    "elastic-ckpt@.service": "usr/lib/systemd/system/elastic-ckpt@.service",
    "user/elastic-ckpt@.service": "usr/lib/systemd/user/elastic-ckpt@.service",
    "elastic-ckpt.sysusers": "usr/lib/sysusers.d/elastic-ckpt.conf",
    "elastic-ckpt.tmpfiles": "usr/lib/tmpfiles.d/elastic-ckpt.conf",
}

LAUNCHER = """\
#!/opt/elastic-ckpt/bin/python3
import sys

from elastic_ckpt.cli.app import main

sys.exit(main())
"""

CONTROL = """\
Package: elastic-ckpt
Version: {version}
Architecture: {architecture}
Maintainer: The elastic-ckpt authors <elastic-ckpt@localhost>
Installed-Size: {size}
Depends: python3 (>= {python}), python3 (<< {after}), systemd
Section: science
Priority: optional
Description: {summary}
 The supervisor that keeps distributed training alive on machines that can be taken away, as the
 service elastic-ckpt@NAME. Workers run with the Python that a job file names, which needs torch
 and elastic-ckpt {version}.
"""

# Running jobs keep the version that they began with until their next start.
POSTINST = """\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
    /opt/elastic-ckpt/bin/python3 -m compileall -q /opt/elastic-ckpt/lib || true
    systemd-sysusers elastic-ckpt.conf
    systemd-tmpfiles --create elastic-ckpt.conf
    if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
fi
"""
PRERM = """\
#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl stop 'elastic-ckpt@*.service'
fi
find /opt/elastic-ckpt/lib -name __pycache__ -type d -prune -exec rm -r {} +
"""
POSTRM = """\
#!/bin/sh
set -e
if [ -d /run/systemd/system ]; then systemctl daemon-reload; fi
"""


def build(wheel: Path, output: Path) -> Path:
    """Build the package from a wheel, and return its path."""
    about = wheel_metadata(wheel)
    python = _say(PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])")
    architecture = _say("dpkg", "--print-architecture")
    made = output / f"elastic-ckpt_{about['Version']}_{architecture}.deb"
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch) / "root"
        root.mkdir()
        site = root / HOME / "lib" / f"python{python}" / "site-packages"
        _install(wheel, site, python)
        _make_environment(root / HOME, python, site)
        _place_files(root, site)
        _write_control(root, about, architecture, python)
        _set_times(root)
        command = ["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(made)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return made


def wheel_metadata(wheel: Path) -> email.message.Message:
    """Return a wheel's METADATA."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def _install(wheel: Path, site: Path, python: str) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip += ["--no-deps", "--no-compile", "--only-binary=:all:", "--implementation=cp"]
    pip += [f"--python-version={python}", f"--target={site}"]
    subprocess.run([*pip, "-r", str(ROOT / "requirements" / "service.txt"), str(wheel)], check=True)


def _make_environment(home: Path, python: str, site: Path) -> None:
    """Turn a directory into a virtual environment, as the venv module of the system makes it."""
    programs = home / "bin"
    programs.mkdir()
    for name in ("python3", f"python{python}"):
        (programs / name).symlink_to(PYTHON)
    (home / "pyvenv.cfg").write_text(
        f"home = {Path(PYTHON).parent}\ninclude-system-site-packages = false\nversion = {python}\n"
    )
    shutil.move(site / "bin" / "py-spy", programs / "py-spy")  # a program, not a script
    shutil.rmtree(site / "bin")
    launcher = programs / "elastic-ckpt"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)


def _place_files(root: Path, site: Path) -> None:
    for name, place in PLACES.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(UNITS / name, root / place)
    program = root / "usr" / "bin" / "elastic-ckpt"
    program.parent.mkdir()
    program.symlink_to("../../opt/elastic-ckpt/bin/elastic-ckpt")
    docs = root / "usr" / "share" / "doc" / "elastic-ckpt"
    docs.mkdir(parents=True)
    shutil.copy(ROOT / "LICENSE", docs / "copyright")
    shutil.copy(ROOT / "CHANGELOG.md", docs / "CHANGELOG.md")
    (docs / "sbom.cdx.json").write_text(json.dumps(bill(site), indent=2) + "\n")


def _write_control(
    root: Path, about: email.message.Message, architecture: str, python: str
) -> None:
    size = sum(path.lstat().st_size for path in root.rglob("*") if path.is_file())
    major, minor = python.split(".")
    control = root / "DEBIAN"
    control.mkdir()
    (control / "control").write_text(
        CONTROL.format(
            version=about["Version"],
            architecture=architecture,
            size=size // 1024,
            python=python,
            after=f"{major}.{int(minor) + 1}",
            summary=textwrap.shorten(about["Summary"], 60, placeholder=""),
        )
    )
    for name, script in (("postinst", POSTINST), ("prerm", PRERM), ("postrm", POSTRM)):
        (control / name).write_text(script)
        (control / name).chmod(0o755)


def _set_times(root: Path) -> None:
    """Give all files the time of the release, and modes that no umask changes."""
    moment = os.environ.get("SOURCE_DATE_EPOCH")
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & 0o100
            path.chmod(0o755 if runs else 0o644)
        if moment:
            os.utime(path, (int(moment), int(moment)), follow_symlinks=False)


def _say(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sys.argv[2])))

"""What ``make dist`` has built: the wheel, the bill of materials, the Debian package."""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import elastic_ckpt
from scripts.release.debian import PLACES, wheel_metadata
from tests.interpreters import make_environment
from tests.machine import REPOSITORY, Machine, why_not
from tests.system.test_systemd import Service

DIST = REPOSITORY / "dist"
VERSION = elastic_ckpt.__version__
DEB = next(DIST.glob(f"elastic-ckpt_{VERSION}_*.deb"), None)

pytestmark = pytest.mark.skipif(
    not (DIST / "SHA256SUMS").exists(), reason="nothing built: make dist"
)


def sources() -> dict[str, bytes]:
    return {name: (REPOSITORY / "systemd" / name).read_bytes() for name in PLACES}


def test_wheel_and_sdist_have_the_units_of_this_repository() -> None:
    wheel = DIST / f"elastic_ckpt-{VERSION}-py3-none-any.whl"
    assert wheel_metadata(wheel)["Version"] == VERSION
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        units = {name: archive.read(f"elastic_ckpt/cli/systemd/units/{name}") for name in PLACES}
    assert units == sources()
    assert all(name.startswith(("elastic_ckpt/", "elastic_ckpt-")) for name in names)
    with tarfile.open(DIST / f"elastic_ckpt-{VERSION}.tar.gz") as archive:
        assert not [one.name for one in archive if one.issym() and one.linkname.startswith("/")]


def test_bill_names_what_is_pinned_and_nothing_else() -> None:
    bill = json.loads((DIST / f"elastic-ckpt-{VERSION}.cdx.json").read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    subject = bill["metadata"]["component"]
    assert (subject["name"], subject["version"]) == ("elastic-ckpt", VERSION)
    found = {f"{one['name']}=={one['version']}" for one in bill["components"]}
    lines = (REPOSITORY / "requirements" / "service.txt").read_text().splitlines()
    assert found == {line for line in lines if line[0] != "#" and ";" not in line}
    refs = {one["bom-ref"] for one in [*bill["components"], subject]}
    assert {one["ref"] for one in bill["dependencies"]} == refs
    assert {ref for one in bill["dependencies"] for ref in one["dependsOn"]} < refs


@pytest.mark.skipif(DEB is None, reason="no Debian package built: needs dpkg-deb")
@pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")
def test_debian_package_runs_a_job_and_goes(tmp_path: Path) -> None:
    """On a machine of its own, in the system's Python; the workers in an environment of theirs."""
    root = tmp_path / "jobs"
    root.mkdir()
    theirs = make_environment(root / "venv")
    shutil.copy(str(DEB), root / "elastic-ckpt.deb")
    with Machine(tmp_path / "machine", [root]) as machine:
        machine.run("dpkg", "-i", str(root / "elastic-ckpt.deb"))
        assert machine.run("elastic-ckpt", "--version").split()[-1] == VERSION
        said = machine.run("elastic-ckpt", "systemd", "install", check=False)
        assert said == ""  # refused: the package's unit is the one
        machine.run("chown", "elastic-ckpt", str(root))
        machine.write(
            "/etc/systemd/system/elastic-ckpt@.service.d/test.conf",
            f"[Service]\nBindPaths={root}\n"
            f"BindReadOnlyPaths={REPOSITORY} {sys.prefix} {sys.base_prefix}\n",
        )
        machine.systemctl("daemon-reload")
        service = Service(machine, root, "gpt")
        machine.keep(f"{service.name}.service")
        machine.systemctl("start", service.name, check=False)
        shown = machine.journal(service.name)
        assert "name the job's own Python by --python" in shown, shown

        service.write(python=str(theirs))
        machine.systemctl("reset-failed", service.name)
        service.start()
        assert "training, incarnation 1" in service.show()["StatusText"]
        assert "/opt/elastic-ckpt/bin/python3" in machine.run(
            "cat", f"/proc/{service.show()['MainPID']}/cmdline"
        )
        service.stop()
        shown = service.show()
        assert (shown["Result"], shown["ExecMainStatus"]) == ("success", "75")
        machine.run("dpkg", "-r", "elastic-ckpt")
        assert machine.run("ls", "-d", "/opt/elastic-ckpt", check=False) == ""
        assert machine.run("ls", f"{root}/gpt") != ""

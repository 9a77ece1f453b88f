"""What make dist is made of: pins that fit, and a bill of materials that is the same twice."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import elastic_ckpt
from scripts.release.sbom import bill
from scripts.release.tag import CHANGES, tag_text

pytestmark = pytest.mark.one_torch
ROOT = Path(__file__).parents[2]
OF_WORKERS = {"torch", "numpy", "safetensors"}


def pins(name: str) -> dict[str, Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found = [Requirement(line) for line in lines if line and line[0] != "#"]
    return {canonicalize_name(one.name): one for one in found}


def test_service_has_what_the_supervisor_needs_and_no_torch() -> None:
    project = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["bucket"]]
    needed = {canonicalize_name(one.name): one for one in map(Requirement, lines)}
    found = pins("service.txt")
    assert needed.keys() - found.keys() == OF_WORKERS
    assert not OF_WORKERS & found.keys()
    for name, one in found.items():
        [pin] = one.specifier
        assert pin.operator == "=="
        if name in needed:
            assert needed[name].specifier.contains(pin.version), one


def test_build_is_pinned_within_what_the_project_asks_for() -> None:
    found = pins("dist.txt")
    build = msgspec.toml.decode((ROOT / "pyproject.toml").read_bytes())["build-system"]
    for one in map(Requirement, build["requires"]):
        [pin] = found[canonicalize_name(one.name)].specifier
        assert one.specifier.contains(pin.version)
    assert all([one.operator for one in pin.specifier] == ["=="] for pin in found.values())


def test_bill_has_licenses_and_what_needs_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1796040000")
    for text in (
        "Name: elastic-ckpt\nVersion: 1\nRequires-Dist: Some.Thing>=2\nRequires-Dist: torch\n",
        "Name: Some_Thing\nVersion: 3\nLicense-Expression: MIT\n",
    ):
        name, version = (line.split()[1] for line in text.splitlines()[:2])
        made = tmp_path / f"{name}-{version}.dist-info"
        made.mkdir()
        (made / "METADATA").write_text(f"Metadata-Version: 2.4\n{text}")
    found = bill(tmp_path)
    assert found["metadata"]["component"]["purl"] == "pkg:pypi/elastic-ckpt@1"
    assert found["metadata"]["timestamp"] == "2026-11-30T12:00:00Z"
    [other] = found["components"]
    assert (other["name"], other["licenses"]) == ("some-thing", [{"expression": "MIT"}])
    assert found["dependencies"] == [
        {"ref": "pkg:pypi/elastic-ckpt@1", "dependsOn": ["pkg:pypi/some-thing@3"]},
        {"ref": "pkg:pypi/some-thing@3", "dependsOn": []},
    ]
    assert bill(tmp_path) == found


def test_change_log_begins_with_this_version_and_its_date() -> None:
    text = tag_text(CHANGES.read_text(), elastic_ckpt.__version__)
    assert re.match(rf"elastic-ckpt {elastic_ckpt.__version__}, \d{{4}}-\d\d-\d\d\n\n\w", text)
    assert "](" not in text and "\n## " not in text
    with pytest.raises(ValueError, match="does not begin with"):
        tag_text("# Changes\n\n## 0.2.0 (unreleased)\n", "0.2.0")

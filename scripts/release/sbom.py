"""A software bill of materials (CycloneDX 1.6, JSON) of the packages in a directory.

    python -m scripts.release.sbom SITE_PACKAGES > elastic-ckpt.cdx.json

The same packages give the same bytes: the time is SOURCE_DATE_EPOCH's, the serial number follows
from the contents.
"""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MAIN = "elastic-ckpt"
_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # RFC 9562: URLs


def bill(site: Path) -> dict[str, Any]:
    """Return the bill of what is installed in a directory, with elastic-ckpt as its subject."""
    found = {
        canonicalize_name(one.metadata["Name"]): one
        for one in metadata.distributions(path=[str(site)])
    }
    components = {name: _component(name, one) for name, one in sorted(found.items())}
    main = components.pop(MAIN)
    contents = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"timestamp": _timestamp(), "component": {**main, "type": "application"}},
        "components": list(components.values()),
        "dependencies": [
            {"ref": _purl(name, one), "dependsOn": _needs(one, found)}
            for name, one in sorted(found.items())
        ],
    }
    serial = uuid.uuid5(_NAMESPACE, json.dumps(contents, sort_keys=True))
    return {"serialNumber": serial.urn, **contents}


def _component(name: str, one: metadata.Distribution) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "type": "library",
        "bom-ref": _purl(name, one),
        "name": name,
        "version": one.version,
        "purl": _purl(name, one),
    }
    expression = one.metadata.get("License-Expression")
    classifiers = [
        line.rpartition(" :: ")[2]
        for line in one.metadata.get_all("Classifier") or ()
        if line.startswith("License :: OSI Approved :: ")
    ]
    if expression:
        shown["licenses"] = [{"expression": expression}]
    elif classifiers:
        shown["licenses"] = [{"license": {"name": line}} for line in classifiers]
    return shown


def _needs(one: metadata.Distribution, found: dict[str, metadata.Distribution]) -> list[str]:
    """Return what a package needs of what is there; an extra's packages if they are there."""
    needed = set()
    for line in one.requires or ():
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name in found:
            needed.add(_purl(name, found[name]))
    return sorted(needed)


def _purl(name: str, one: metadata.Distribution) -> str:
    return f"pkg:pypi/{name}@{one.version}"


def _timestamp() -> str:
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


if __name__ == "__main__":
    print(json.dumps(bill(Path(sys.argv[1])), indent=2))

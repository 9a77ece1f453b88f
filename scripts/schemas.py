"""Write the JSON Schema of a command's ``--json``: python scripts/schemas.py FILE.

The file's name says which: ``status.json`` or ``report.json``.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from elastic_ckpt.cli.report.figures import ReportFigures
from elastic_ckpt.cli.status.view import StatusView

KINDS: dict[str, type] = {"status": StatusView, "report": ReportFigures}


def status_schema() -> dict[str, Any]:
    """Return the schema of ``status --json``; keys may be added, but never removed."""
    return schema_of("status")


def report_schema() -> dict[str, Any]:
    """Return the schema of ``report --json``; keys may be added, but never removed."""
    return schema_of("report")


def schema_of(command: str) -> dict[str, Any]:
    """Return the schema of a command's ``--json``."""
    schema = msgspec.json.schema(KINDS[command])
    for part in schema["$defs"].values():
        if "description" in part:
            part["description"] = inspect.cleandoc(part["description"])
    title = f"elastic-ckpt {command} --json"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **schema}


def main() -> None:
    """Write the schema."""
    path = Path(sys.argv[1])
    path.write_text(json.dumps(schema_of(path.stem), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

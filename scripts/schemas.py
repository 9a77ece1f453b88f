"""Write the JSON Schema of ``elastic-ckpt status --json``: python scripts/schemas.py FILE."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from elastic_ckpt.cli.status.view import StatusView

TITLE = "elastic-ckpt status --json"


def status_schema() -> dict[str, Any]:
    """Return the schema of ``status --json``; keys may be added, but never removed."""
    schema = msgspec.json.schema(StatusView)
    for part in schema["$defs"].values():
        part["description"] = inspect.cleandoc(part["description"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": TITLE, **schema}


def main() -> None:
    """Write the schema."""
    Path(sys.argv[1]).write_text(json.dumps(status_schema(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()

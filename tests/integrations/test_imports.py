"""What importing an integration brings into a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIST_MODULES = "import sys; {}; print(*sys.modules)"


def modules_after(statement: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES.format(statement)],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


def test_the_package_imports_no_framework() -> None:
    pytest.importorskip("torch")
    added = modules_after("import elastic_ckpt.integrations")
    assert not added & {"torch", "transformers", "accelerate", "lightning", "pytorch_lightning"}

"""The examples of CONTRIBUTING.md, installed as the packages that a reader would make of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def install_example(section: str, directory: Path) -> None:
    """Install a section's example below a directory, which then has to be on ``sys.path``."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    part = text.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    [code] = re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    [toml] = re.findall(r"```toml\n(.*?)```", part, re.DOTALL)
    [(group, name, module, attribute)] = re.findall(
        r'\[project\.entry-points\."(.+)"\]\n(\w+) = "(\w+):(\w+)"\n', toml
    )
    (directory / f"{module}.py").write_text(code, encoding="utf-8")
    metadata = directory / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:{attribute}\n")

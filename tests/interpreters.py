"""Environments of their own for tests: virtual ones that see some of this one's packages."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
TORCH = ("torch", "torch-", "functorch", "torchgen", "nvidia", "triton")


def make_environment(
    directory: Path, *, torch: bool = True, package: Path | None = REPOSITORY
) -> Path:
    """Return the interpreter of a new environment.

    Args:
        torch: whether it has torch.
        package: where its elastic_ckpt lies; None for none.
    """
    venv = [sys.executable, "-m", "venv", "--without-pip", str(directory)]
    subprocess.run(venv, check=True, timeout=60)
    [site] = (directory / "lib").glob("python*/site-packages")
    if package is not None:
        (site / "elastic_ckpt.pth").write_text(f"{package}\n")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        name = path.name.lower()
        is_torch = name in TORCH or name.startswith(("torch-", "nvidia", "triton"))
        is_ours = name.startswith(("elastic_ckpt", "__editable__"))
        if is_ours or path.suffix == ".pth" or (is_torch and not torch):
            continue
        (site / path.name).symlink_to(path)
    return directory / "bin" / "python"

"""Which sources there are, by the names of ``--notice-source``, and which suit this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.notices import NoticeSource

AUTO: Final = "auto"
NONE: Final = "none"
DMI: Final = Path("/sys/class/dmi/id")

_AZURE_TAG: Final = "7783-7084-3265-9085-8269-3286-77"
"""The chassis asset tag of every machine of Azure, and of no other one of Microsoft's."""


def _slurm() -> list[NoticeSource]:
    from elastic_ckpt.notices.slurm import SlurmSource

    return [SlurmSource()]


def _aws() -> list[NoticeSource]:
    from elastic_ckpt.notices.aws import AwsSource

    return [AwsSource()]


def _gcp() -> list[NoticeSource]:
    from elastic_ckpt.notices.gcp import GcpMaintenance, GcpPreempted

    return [GcpPreempted(), GcpMaintenance()]


def _azure() -> list[NoticeSource]:
    from elastic_ckpt.notices.azure import AzureSource

    return [AzureSource()]


PLATFORMS: Final[Mapping[str, Callable[[], list[NoticeSource]]]] = {
    "slurm": _slurm,
    "aws": _aws,
    "gcp": _gcp,
    "azure": _azure,
}


def choose(names: Iterable[str]) -> tuple[str, ...]:
    """The platforms of these names, each once; ``auto`` stands for those of this machine.

    Raises:
        UsageError: there is none of that name, or ``slurm`` was asked for outside a job of it.
    """
    chosen: dict[str, None] = {}
    for name in names:
        chosen.update(dict.fromkeys(detect() if name == AUTO else [name]))
    chosen.pop(NONE, None)
    unknown = [name for name in chosen if name not in PLATFORMS]
    if unknown:
        there = ", ".join([AUTO, NONE, *PLATFORMS])
        raise UsageError(f"--notice-source {unknown[0]!r} is none of {there}")
    if "slurm" in chosen and not os.environ.get("SLURM_JOB_ID"):
        raise UsageError("--notice-source slurm is for a job of SLURM: SLURM_JOB_ID is not set")
    return tuple(chosen)


def make_sources(names: Iterable[str], file: Path | None, grace: float) -> list[NoticeSource]:
    """The sources of these platforms, and of a file if one was given.

    Args:
        grace: seconds, where the file says none.
    """
    sources = [source for name in names for source in PLATFORMS[name]()]
    if file is not None:
        from elastic_ckpt.notices.file import FileSource

        sources.append(FileSource(file, grace))
    return sources


def detect(dmi: Path = DMI) -> list[str]:
    """The platforms of this machine, by what its environment and firmware say; asks nobody."""
    found = ["slurm"] if os.environ.get("SLURM_JOB_ID") else []
    vendor, product = _read(dmi / "sys_vendor"), _read(dmi / "product_name")
    if vendor == "Amazon EC2" or _read(dmi / "bios_vendor") == "Amazon EC2":
        found.append("aws")
    if product == "Google Compute Engine":
        found.append("gcp")
    if _read(dmi / "chassis_asset_tag") == _AZURE_TAG:
        found.append("azure")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""

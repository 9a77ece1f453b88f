"""Notice sources by name, for ``--notice-source``; detection of this machine's platform."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.notices import NoticeSource
from elastic_ckpt.util.plugins import load_plugin, plugin_names

AUTO: Final = "auto"
NONE: Final = "none"
DMI: Final = Path("/sys/class/dmi/id")
GROUP: Final = "elastic_ckpt.notices"

BUILT_IN: Final[Mapping[str, str]] = {
    "slurm": "elastic_ckpt.notices.slurm:SlurmSource",
    "aws": "elastic_ckpt.notices.aws:AwsSource",
    "gcp": "elastic_ckpt.notices.gcp:gcp_sources",
    "azure": "elastic_ckpt.notices.azure:AzureSource",
}
"""Callables without arguments that return a source or a list of sources."""

_AZURE_TAG: Final = "7783-7084-3265-9085-8269-3286-77"
"""The chassis asset tag of every Azure machine, and of no other Microsoft machine."""


def source_names() -> list[str]:
    """Return all values that ``--notice-source`` accepts."""
    return [AUTO, NONE, *plugin_names(GROUP, BUILT_IN)]


def choose(names: Iterable[str]) -> tuple[str, ...]:
    """Return the selected platforms, each once; ``auto`` stands for those of this machine.

    Raises:
        UsageError: a name is unknown, ``none`` is not alone, or ``slurm`` is selected outside a
            SLURM job.
    """
    names = tuple(names)
    if NONE in names and set(names) != {NONE}:
        others = ", ".join(name for name in names if name != NONE)
        raise UsageError(f"--notice-source none excludes {others}: leave one of them out")
    chosen: dict[str, None] = {}
    for name in names:
        chosen.update(dict.fromkeys(detect() if name == AUTO else [name]))
    chosen.pop(NONE, None)
    unknown = [name for name in chosen if name not in BUILT_IN]
    if unknown and not set(unknown) <= set(source_names()):
        raise UsageError(
            f"unknown --notice-source {unknown[0]!r}; available: {', '.join(source_names())}. "
            f"To add one, install a package with an entry point in the group {GROUP}"
        )
    if "slurm" in chosen and not os.environ.get("SLURM_JOB_ID"):
        raise UsageError(
            "--notice-source slurm works only inside a SLURM job: SLURM_JOB_ID is not set"
        )
    return tuple(chosen)


def make_sources(
    names: Iterable[str], file: Path | None = None, grace: float = 0.0
) -> list[NoticeSource]:
    """Construct the sources of these platforms, and of a notice file if there is one.

    Args:
        grace: seconds until the deadline where the file does not contain any.

    Raises:
        UsageError: a package that provides a source cannot be imported, or provides something else.
    """
    sources = [source for name in names for source in _construct(name)]
    if file is not None:
        from elastic_ckpt.notices.file import FileSource

        sources.append(FileSource(file, grace))
    return sources


def _construct(name: str) -> list[NoticeSource]:
    made = load_plugin("notice source", name, GROUP, BUILT_IN)()
    sources = made if isinstance(made, list) else [made]
    for source in sources:
        if not isinstance(source, NoticeSource):
            raise UsageError(
                f"the notice source {name!r} is a {type(source).__name__}, which does not derive "
                "from elastic_ckpt.notices.NoticeSource: report it to the package's author"
            )
    return sources


def detect(dmi: Path = DMI) -> list[str]:
    """Return the platforms of this machine by its environment and firmware, without any request."""
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

"""Where copies of the job's state are: by session and tier, with the replicas in nodes' memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from elastic_ckpt.checkpoint.catalog import CheckpointView
from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.util.text import printable

_ORDER: Final = ("memory", "replicas", "disk", "own", "bucket")
_PLACES: Final = {
    "memory": "memory of this machine",
    "replicas": "memory of other nodes",
    "disk": "disk",
    "own": "disk, written by the script",
    "bucket": "bucket",
}
_REPLICAS: Final = "replicas"


@dataclass(frozen=True)
class TierRow:
    """The checkpoints of one session in one tier.

    Attributes:
        place: the tier in words.
        newest: step of the newest intact one; None without one.
        count: intact ones; for replicas the copies that were made.
        bytes: of all of these.
        problem: what is wrong; empty for nothing.
    """

    session: str
    tier: str
    place: str
    newest: int | None
    count: int
    bytes: int
    problem: str = ""


def tier_rows(material: Material) -> list[TierRow]:
    """Return a row for each session and tier that holds or held something."""
    groups: dict[tuple[str, str], list[CheckpointView]] = {}
    for one in material.checkpoints:
        tier = "own" if one.own is not None else one.tier
        groups.setdefault((one.session, tier), []).append(one)
    rows = [_row(session, tier, found) for (session, tier), found in groups.items()]
    replicas = _replicas(material)
    if replicas is not None:
        rows.append(replicas)
    return sorted(rows, key=lambda row: (row.session, _rank(row.tier), row.tier))


def _rank(tier: str) -> int:
    return _ORDER.index(tier) if tier in _ORDER else len(_ORDER)


def _row(session: str, tier: str, found: list[CheckpointView]) -> TierRow:
    intact = [one for one in found if one.intact]
    damaged = len(found) - len(intact)
    return TierRow(
        printable(session), tier, _PLACES.get(tier, printable(tier)),
        max((one.age for one in intact), default=(0, 0, None))[-1],
        len(intact),
        sum(one.seal.total_bytes for one in intact if one.seal is not None),
        f"{damaged} not intact" if damaged else "",
    )  # fmt: skip


def _replicas(material: Material) -> TierRow | None:
    found = material.history.copies
    if not found.count and not found.failures:
        return None
    problem = f"{found.failures} failed, the last: {printable(found.error, 200)}"
    return TierRow(
        "", _REPLICAS, _PLACES[_REPLICAS], found.newest[1] if found.newest else None,
        found.count, found.bytes, problem if found.failures else "",
    )  # fmt: skip

"""Nodes whose disk is slow, so that those which leave hand over what they have in memory."""

from __future__ import annotations

from pathlib import Path

from elastic_ckpt.cli.status.view import StatusView
from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.board import Board
from tests.cluster import Cluster

INTERVAL = 40
SLOW_DISK = Path(__file__).parent / "standins" / "slow_disk"
"""A package for ``Node.packages``."""


def steps(cluster: Cluster, kind: str) -> list[int]:
    return [one["step"] for one in cluster.noted(kind)]


def is_calm(cluster: Cluster, view: StatusView) -> bool:
    """Whether the disk has all that was saved, the head knows that it is slow, and no save on the
    interval is near."""
    in_memory = [one["step"] for one in cluster.noted("saved") if one["tier"] == "memory"]
    is_drained = in_memory == steps(cluster, "drained") != []
    is_far = all(worker.step % INTERVAL < INTERVAL / 2 for worker in view.workers)
    return is_drained and is_far and _hands_over(cluster)


def _hands_over(cluster: Cluster) -> bool:
    boards = [one.board for one in job_records(JobDirectory.at(cluster.head.directory))]
    return any(Board.open(board, writable=False).hand_over_seconds for board in boards if board)

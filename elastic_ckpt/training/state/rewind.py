"""Continuing from an older checkpoint that the script chose."""

from __future__ import annotations

import time
from typing import Final

from elastic_ckpt.checkpoint.lineage import supersede_newer
from elastic_ckpt.errors import StorageFailed
from elastic_ckpt.journal.events import Superseded
from elastic_ckpt.training.runtime import Runtime

DRAIN_SECONDS: Final = 120.0
"""How long what is in memory alone may take to reach the disk, where it can be set aside."""

_POLL_SECONDS: Final = 0.1


def leave_branch(runtime: Runtime, key: tuple[int, int]) -> None:
    """Supersede all checkpoints after (epoch, step), before the first save of another branch.

    Leader only.

    Raises:
        StorageFailed: one of them is in memory alone, and does not get to the disk.
        RunSuperseded: another run has taken the job over.
        OSError: one cannot be moved.
    """
    runtime.fence.check()
    _clear_memory(runtime, key)
    if runtime.bucket is not None:
        aside = runtime.bucket.tier(runtime.job).leave_newer(key)
        if aside:
            runtime.say(f"continuing from step {key[1]}: {len(aside)} newer moved to {aside[0]}")
        for url in aside:
            runtime.journal.write(Superseded(to=url, step=key[1]))
        return
    moved = supersede_newer(runtime.job, key, f"the job was continued from step {key[1]}")
    if moved:
        names = ", ".join(path.name.rsplit("-", 2)[0] for path in moved[:3])
        more = f" and {len(moved) - 3} more" if len(moved) > 3 else ""
        runtime.say(
            f"continuing from step {key[1]}: {names}{more} moved to {runtime.job.superseded}; "
            f"elastic-ckpt restore {runtime.job.root} NAME brings one back"
        )
        for path in moved:
            runtime.journal.write(Superseded(to=str(path), step=key[1]))


def _clear_memory(runtime: Runtime, key: tuple[int, int]) -> None:
    """Wait until what is newer than ``key`` in this node's memory is drained, and remove it."""
    memory, limit = runtime.memory, time.monotonic() + DRAIN_SECONDS
    later = [one for one in memory.sealed() if one.key > key] if memory else []
    while later and not all(one.settled for one in later) and memory is not None:
        if time.monotonic() > limit:
            raise StorageFailed(
                0, f"step {later[0].key[1]}, which is to be set aside, is in memory only"
            )
        time.sleep(_POLL_SECONDS)
        later = [one for one in memory.sealed() if one.key > key]
    for one in later:
        one.generation.clear()

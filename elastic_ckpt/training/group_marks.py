"""When the default process group is made, for the breakdown of a recovery."""

from __future__ import annotations

import functools
from typing import Any

from torch import distributed

from elastic_ckpt.protocol.slot import SlotWriter


def mark_group(slot: SlotWriter) -> None:
    """Note on the board when the first ``init_process_group`` begins and ends; then step aside.

    A module that took the function out of ``torch.distributed`` before is not seen: its time
    counts as the building of the model.
    """
    dist: Any = distributed
    plain = dist.init_process_group

    @functools.wraps(plain)
    def marked(*args: Any, **options: Any) -> Any:
        dist.init_process_group = plain
        slot.group_begins()
        try:
            return plain(*args, **options)
        finally:
            slot.group_is_made()

    dist.init_process_group = marked

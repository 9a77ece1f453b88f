"""The job's store, which torch has made for the default process group."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Final

from torch import distributed

from elastic_ckpt.training.ranks.rank_errors import leader_lost

CONNECT_SECONDS: Final = 10.0

dist: Any = distributed
"""Its stores are public, but untyped."""


def job_store() -> Any:
    """Return the process group's connection to the job's store, with this launch's own keys."""
    return dist.PrefixStore(_prefix(), _base_store())


def private_store() -> Any:
    """Return a separate connection to the job's store, for a thread: a client runs one call at a
    time. None if it is not a TCP store; LeaderLost if the store does not answer."""
    store = _base_store()
    if not isinstance(store, dist.TCPStore):
        return None
    try:
        fresh = dist.TCPStore(
            store.host, store.port, is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )  # fmt: skip
    except RuntimeError as error:  # its host has just died
        raise leader_lost(error) from None
    return dist.PrefixStore(_prefix(), fresh)


def _base_store() -> Any:
    """Return the store below the default process group; torch has no public name for it."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def _prefix() -> str:
    """Return a key prefix of this launch: torchrun keeps its store across restarts."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"elastic-ckpt/{run}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

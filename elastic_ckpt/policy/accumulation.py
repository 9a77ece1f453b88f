"""Micro-batches per optimizer step, so that the global batch is the same at any world size."""

from __future__ import annotations

from elastic_ckpt.errors import UsageError


def accumulation_steps(global_batch: int, batch_size: int, replicas: int) -> int:
    """Return the number of micro-batches per optimizer step and rank.

    Args:
        global_batch: samples of one optimizer step, over all ranks.
        batch_size: samples of one micro-batch of one rank.
        replicas: ranks that see different samples.

    Raises:
        UsageError: the global batch is not a multiple of ``batch_size * replicas``; the message
            lists rank counts that work.
    """
    samples = batch_size * replicas
    if global_batch % samples == 0:
        return global_batch // samples
    fitting = [
        ranks for ranks in range(1, global_batch + 1) if global_batch % (batch_size * ranks) == 0
    ]
    problem = (
        f"a global batch of {global_batch} is not a multiple of micro-batches of {batch_size} on "
        f"{replicas} rank{'s' if replicas > 1 else ''}"
    )
    if fitting:
        shown = ", ".join(map(str, fitting[:8]))
        raise UsageError(f"{problem}: use {shown}{' or more' if len(fitting) > 8 else ''} ranks")
    raise UsageError(f"{problem}: choose a multiple of {samples}")


def step_size_changed(before: int, now: int) -> str:
    """Return one line on a step that takes another number of samples than before a restart; empty
    if it does not, or if one of them is 0 for unknown."""
    if not before or not now or before == now:
        return ""
    return (
        f"a step takes {now} samples instead of {before}, so learning rate and schedule may not "
        f"fit: --global-batch {before}, or global_batch={before} of the Session, keeps it in a "
        "script that steps `if session.step_ends`"
    )

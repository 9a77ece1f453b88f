"""How many micro-batches make an optimizer step, so that a step has the same size on any ranks."""

from __future__ import annotations

from elastic_ckpt.errors import UsageError


def accumulation_steps(global_batch: int, batch_size: int, replicas: int) -> int:
    """Micro-batches per optimizer step and rank.

    Args:
        global_batch: samples of one optimizer step, all ranks together.
        batch_size: samples of one micro-batch of one rank.
        replicas: ranks that see different samples.

    Raises:
        UsageError: the step cannot be made of whole micro-batches; it names what can.
    """
    at_once = batch_size * replicas
    if global_batch % at_once == 0:
        return global_batch // at_once
    fitting = [
        ranks for ranks in range(1, global_batch + 1) if global_batch % (batch_size * ranks) == 0
    ]
    what = (
        f"a global batch of {global_batch} cannot be made of micro-batches of {batch_size} on "
        f"{replicas} rank{'s' if replicas > 1 else ''}"
    )
    if fitting:
        shown = ", ".join(map(str, fitting[:8]))
        raise UsageError(f"{what}: it can on {shown}{' or more' if len(fitting) > 8 else ''}")
    raise UsageError(f"{what}: choose a multiple of {at_once}")

"""Where a job will resume, for a script that has to know before it builds its optimizer."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from elastic_ckpt.training import runtime as runtimes
from elastic_ckpt.training.state.load import choose
from elastic_ckpt.training.state.session_state import read_session_state


@dataclass(frozen=True)
class Place:
    """Where a Session will resume; all zero and empty for a fresh start.

    Attributes:
        epoch, step: epochs begun before this one, and optimizer steps finished.
        step_in_epoch: optimizer steps finished in this epoch.
        sample_start_index: samples of this epoch that all ranks together have used.
        metrics: what was reported last, by name.
        state: ``session.state`` as it was saved.
        checkpoint: the name of the checkpoint; empty for a fresh start.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    sample_start_index: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    checkpoint: str = ""


def resume_place(save_dir: str | os.PathLike[str] | None = None, *, name: str = "") -> Place:
    """Return where ``Session(save_dir, name=name)`` will resume, before model and optimizer exist.

    Collective, after the process group is made. The checkpoint is verified here, and that very one
    is loaded when the Session is entered.

    Args:
        save_dir, name: as the Session receives them.

    Raises:
        UsageError: the Session was entered already.
        NoUsableCheckpoint, UnsupportedFormat: as ``Session.__enter__`` raises them.
    """
    runtime = runtimes.join(save_dir).of_session(name)
    runtime.looked[name] = runtime
    if not runtime.has_looked:
        runtime.candidate, runtime.has_looked = choose(runtime), True
    if runtime.candidate is None:
        return Place()
    loaded = runtime.candidate.loaded
    seal = loaded.seal
    return Place(
        seal.epoch, seal.step, seal.step_in_epoch, seal.sample_start_index, dict(seal.metrics),
        read_session_state(loaded), seal.checkpoint_name,
    )  # fmt: skip

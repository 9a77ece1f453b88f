"""elastic-ckpt: training that survives its machines.

The names below are imported on first use, so that ``import elastic_ckpt`` and the command line
never import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_ckpt.policy.retention import Retention
    from elastic_ckpt.training.data.sampler import ElasticSampler
    from elastic_ckpt.training.data.stateful_sampler import StatefulDistributedSampler
    from elastic_ckpt.training.functions import (
        load_checkpoint,
        notice,
        save_checkpoint,
        should_save,
    )
    from elastic_ckpt.training.place import resume_place
    from elastic_ckpt.training.session import Session

__version__ = "0.2.0"

__all__ = [
    "ElasticSampler",
    "Retention",
    "Session",
    "StatefulDistributedSampler",
    "load_checkpoint",
    "notice",
    "resume_place",
    "save_checkpoint",
    "should_save",
]

_HOMES = {
    "Session": "elastic_ckpt.training.session",
    "resume_place": "elastic_ckpt.training.place",
    "Retention": "elastic_ckpt.policy.retention",
    "ElasticSampler": "elastic_ckpt.training.data.sampler",
    "StatefulDistributedSampler": "elastic_ckpt.training.data.stateful_sampler",
    "notice": "elastic_ckpt.training.functions",
    "save_checkpoint": "elastic_ckpt.training.functions",
    "load_checkpoint": "elastic_ckpt.training.functions",
    "should_save": "elastic_ckpt.training.functions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

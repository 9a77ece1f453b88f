"""Which parameters are frozen: no state has ``requires_grad``, so the script must set it again."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from elastic_ckpt.training.engines.torch.state import canonical_names
from elastic_ckpt.util.text import printable


def frozen_parameters(model: Any) -> dict[str, Any]:
    """Return the names of the frozen parameters, and a digest of all parameters' names."""
    if not isinstance(model, nn.Module):
        return {"names": [], "of": ""}
    found = dict(model.named_parameters())
    names = canonical_names(model, found)
    every = "\n".join(sorted(names.values()))
    return {
        "names": sorted(names[key] for key, one in found.items() if not one.requires_grad),
        "of": hashlib.sha256(every.encode()).hexdigest()[:16],
    }


def frozen_otherwise(before: Any, now: dict[str, Any], name: str, epoch: int) -> str:
    """Return a line if other parameters are frozen than when the checkpoint ``name`` was saved in
    this ``epoch``; empty if not, or if the model has other parameters."""
    if not isinstance(before, dict) or before.get("of") != now["of"]:
        return ""
    saved, current = set(before.get("names", ())), set(now["names"])
    parts = [
        f"{_count(len(names))} {words}, first {printable(str(min(names)), 80)}"
        for names, words in (
            (saved - current, f"frozen when {name} was saved and trained now"),
            (current - saved, f"trained when {name} was saved and frozen now"),
        )
        if names
    ]
    if not parts:
        return ""
    return (
        f"warning: {'; '.join(parts)}: requires_grad is not restored, so set it at each start, as "
        f"in `if epoch >= {epoch}:`, or before the Session by resume_place().epoch"
    )


def _count(number: int) -> str:
    return f"{number} parameter{'s were' if number > 1 else ' was'}"

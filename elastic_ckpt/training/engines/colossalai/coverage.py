"""Whether a checkpoint in ColossalAI's layout contains all of a rank's state.

ColossalAI loads what an index names and ignores the rest silently. So before a seal and before a
load, each rank looks for its own parameters, and before a seal for its optimizer's state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from elastic_ckpt.checkpoint.colossalai_layout import Index, read_index
from elastic_ckpt.util.text import printable

Kind = Literal["modeling", "optimizer"]


def open_index(checkpoint: Path, kind: Kind) -> Index | None:
    """Read the index of ``modeling/`` or ``optimizer/``; None without one. Raises as
    :func:`read_index`."""
    path = next(iter(sorted((checkpoint / kind).glob("*.index.json"))), None)
    return None if path is None else read_index(path)


def what_is_missing(checkpoint: Path, kind: Kind, index: Index, wanted: list[str]) -> str:
    """Return the first missing file or wanted entry of an index; empty if none is missing."""
    for name in sorted(set(index.files)):
        if not (checkpoint / kind / name).is_file():
            return f"{kind}/{printable(name, 200)}, which its index names"
    lacking = [name for name in wanted if name not in index.entries]
    if not lacking:
        return ""
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return f"{printable(lacking[0], 200)}{more} in {kind}/"


def parameter_names(model: Any) -> list[str]:
    """Return the parameters that this rank holds, as an index names them."""
    return [name for name, _ in model.named_parameters()]


def state_numbers(optimizer: Any) -> list[str]:
    """Return the numbers under which ColossalAI saves the state of this rank's optimizer."""
    inner = optimizer.optim
    info = getattr(optimizer, "param_info", None)
    if info is None:
        every = [p for group in inner.param_groups for p in group["params"]]
        return [str(number) for number, p in enumerate(every) if inner.state.get(p)]
    working = optimizer.get_master_to_working_map() or {}
    known = info["param2id"]
    return [str(known[id(working.get(id(p), p))]) for p, state in inner.state.items() if state]

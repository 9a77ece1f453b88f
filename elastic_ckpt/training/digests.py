"""Digests of a rank's state, every so many steps, which ``elastic-ckpt replay`` compares."""

from __future__ import annotations

import base64
import math
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
import xxhash

from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal.audit_events import REPLAY, StateDigest
from elastic_ckpt.journal.journal import Journal
from elastic_ckpt.training.tensors.digest import digest_values
from elastic_ckpt.util.files import write_atomic
from elastic_ckpt.util.text import printable

_SHORT_BYTES: Final = 4
"""Of each tensor's digest, by which a difference is named; all bytes count for the whole."""

_MOST_TENSORS: Final = 8_000
"""Of a line of the journal."""


class DigestChain:
    """Notes what a rank holds after every ``every`` steps; 0 for never.

    Args:
        job: of the session; a named one notes nothing.
        rank: of the job.
    """

    def __init__(
        self,
        every: int,
        job: JobDirectory,
        journal: Journal,
        rank: int,
        model: Any,
        optimizer: Any,
    ) -> None:
        self._every = 0 if job.name else every
        self._job = job
        self._journal = journal
        self._rank = rank
        self._model = model
        self._optimizer = optimizer
        self._names: list[str] = []

    def is_due(self, step: int) -> bool:
        """Return whether the state after a step is to be noted."""
        return self._every > 0 and step % self._every == 0

    def note(self, place: Position, loss: float | None) -> None:
        """Note the state. Not collective, and without an exchange."""
        found = dict(named_state(self._model, self._optimizer))
        digests = digest_values(found)
        if REPLAY in os.environ and list(found) != self._names:
            self._names = list(found)
            self._keep_names()
        parameters = {name: one for name, one in found.items() if not _is_optimizers(name)}
        tensors = b"".join(one[:_SHORT_BYTES] for one in digests.values())
        self._journal.write(
            StateDigest(
                step=place.step,
                epoch=place.epoch,
                sample_start_index=place.sample_start_index,
                order=_order(place),
                parameters=_together(digests[name] for name in parameters),
                optimizer=_together(one for name, one in digests.items() if _is_optimizers(name)),
                tensors=base64.b64encode(tensors).decode() if len(found) <= _MOST_TENSORS else "",
                norm=_norm(parameters.values()),
                loss=loss if loss is None or math.isfinite(loss) else None,
                device=_device(found.values()),
            )
        )

    def _keep_names(self) -> None:
        """Leave the tensors' names where a replay finds them; a job writes no file for that."""
        home = self._job.control / "digests"
        home.mkdir(mode=0o700, exist_ok=True)
        write_atomic(home / f"{self._rank:05d}.json", msgspec.json.encode(self._names))


_OPTIMIZER: Final = "optimizer "


def _is_optimizers(name: str) -> bool:
    return name.startswith(_OPTIMIZER)


def named_state(model: Any, optimizer: Any) -> Iterator[tuple[str, Any]]:
    """Yield this rank's tensors: the model's by their names, then the optimizer's by the names of
    their parameters, or numbered where an optimizer has others than the model's."""
    inner = getattr(optimizer, "optim", optimizer)
    names: dict[int, str] = {}
    for name, one in [*model.named_parameters(), *model.named_buffers()]:
        names[id(one)] = name
        yield name, local(one)
    for index, (parameter, state) in enumerate(getattr(inner, "state", {}).items()):
        name = names.get(id(parameter), f"parameter {index}")
        for key, value in sorted(state.items()):
            if isinstance(value, torch.Tensor):
                yield f"{_OPTIMIZER}{key} of {name}", local(value)


def local(tensor: Any) -> Any:
    """Return this rank's part of a tensor, without its gradient."""
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.detach()


def _together(digests: Iterable[bytes]) -> str:
    return xxhash.xxh3_64(b"".join(digests)).hexdigest()


def _order(place: Position) -> str:
    """Return what stands for the samples' order: with a place in it the samples are known."""
    parts = (place.order_seed, place.order_version, place.dataset_fingerprint, place.dataset_size)
    return xxhash.xxh3_64(repr(parts).encode()).hexdigest()


def _norm(tensors: Iterable[Any]) -> float:
    wide = {torch.float64: torch.float64}
    norms = [
        torch.linalg.vector_norm(one, dtype=wide.get(one.dtype, torch.float32)).double().cpu()
        for one in tensors
        if one.is_floating_point()
    ]
    total = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
    return total if math.isfinite(total) else 0.0


def _device(tensors: Iterable[Any]) -> str:
    on_gpu = next((one for one in tensors if one.device.type == "cuda"), None)
    name = _processor() if on_gpu is None else torch.cuda.get_device_name(on_gpu.device)
    return printable(f"torch {torch.__version__}, {name}", 200)


@cache
def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()

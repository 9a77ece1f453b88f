"""Lightning Fabric: a Session for what ``fabric.setup`` returned: ``docs/lightning.md``.

The loop is the script's own, so the Session's guarantees are those of any loop. Fabric's loaders
count their epochs from each start on, so the script gives its own loader to the Session.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from typing import Any, Final

import elastic_ckpt.training.session as sessions
from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.data.loaders import Batches
from elastic_ckpt.training.session_inputs import check_extra

_PACKAGES: Final = ("lightning.fabric", "lightning_fabric")
_OURS: Final = frozenset({"SingleDeviceStrategy", "DDPStrategy"})


def _wrappers() -> Any:
    """Return the wrappers of the package that the script has imported, else of the installed."""
    for name in (*(one for one in _PACKAGES if one in sys.modules), *_PACKAGES):
        try:
            return importlib.import_module(f"{name}.wrappers")
        except ModuleNotFoundError:
            continue
    raise UsageError("Lightning Fabric is not installed: pip install 'lightning>=2.6'")


_wrapped: Any = _wrappers()


class Session(sessions.Session):
    """As ``elastic_ckpt.Session``, for a loop with ``lightning.fabric.Fabric``.

    Args:
        fabric: launched; on one device, or with DDP.
        model, optimizer: as ``fabric.setup`` returned them; the latter may be None.
        arguments: further ones of ``elastic_ckpt.Session``.

    Raises:
        UsageError: the strategy shards the model.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        *,
        fabric: Any,
        model: Any,
        optimizer: Any = None,
        extra: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> None:
        strategy = type(fabric.strategy).__name__
        if strategy not in _OURS:
            raise UsageError(
                f"a Session cannot save what Fabric sets up with a {strategy}: save with "
                "fabric.save, and run with --watch (docs/own-checkpoints.md)"
            )
        precision, added = fabric.strategy.precision, {}
        if getattr(precision, "scaler", None) is not None:
            added["fabric.precision"] = precision
        super().__init__(
            save_dir,
            model=model.module if isinstance(model, _wrapped._FabricModule) else model,
            optimizer=(
                optimizer.optimizer
                if isinstance(optimizer, _wrapped._FabricOptimizer)
                else optimizer
            ),
            extra=added | check_extra(extra if extra is not None else {}),
            **arguments,
        )
        self._fabric = fabric

    def batches(self, *loaders: Any, position: str | None = None) -> Batches:
        """As ``elastic_ckpt.Session.batches``, on Fabric's device.

        Raises:
            UsageError: a loader was set up by Fabric.
        """
        if any(isinstance(loader, _wrapped._FabricDataLoader) for loader in loaders):
            raise UsageError(
                "fabric.setup_dataloaders returns loaders that begin each epoch anew: pass "
                "session.batches the DataLoader itself, with an ElasticSampler"
            )
        batches = super().batches(*loaders, position=position)
        return Batches(self._on_device(batches), batches.__len__)

    def _on_device(self, batches: Batches) -> Iterator[Any]:
        with closing(iter(batches)) as reading:  # type: ignore[type-var]
            for batch in reading:
                yield self._fabric.to_device(batch)

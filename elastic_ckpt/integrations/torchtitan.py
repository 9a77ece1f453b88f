"""torchtitan: its checkpoint manager with the step agreement in its decision.

In the function of a config registry that returns the trainer's config::

    from elastic_ckpt.integrations.torchtitan import elastic

    config.checkpoint = elastic(config.checkpoint)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.protocol.agreement import ActionKind
from elastic_ckpt.training.own.loop import OwnLoop

COMPLETE_WHEN: Final = ".metadata"
"""Which ``torch.distributed.checkpoint`` writes after the files of all ranks."""

_NEEDED: Final = ("save", "load", "_should_save", "maybe_wait_for_staging", "maybe_wait_for_saving")
_TRAIN_STATE: Final = "train_state"


def elastic(config: Any) -> Any:
    """Return a checkpoint config whose manager also saves when all ranks agree to, and then leaves.

    Args:
        config: a ``CheckpointManager.Config``, or one of a subclass of that manager.

    Raises:
        UsageError: this torchtitan is too old, ``config`` was given here before, or
            checkpoints are off.
    """
    base = getattr(type(config), "_owner", None)
    missing = [name for name in _NEEDED if not callable(getattr(base, name, None))]
    if missing:
        raise UsageError(
            f"{type(config).__qualname__} is no checkpoint config of torchtitan 0.3 or newer (its "
            f"manager has no {missing[0]}): pip install -U torchtitan"
        )
    if getattr(base, "_is_elastic", False):
        raise UsageError("elastic() was called twice: give it torchtitan's own checkpoint config")
    if not config.enable or config.load_only:
        raise UsageError(
            "torchtitan saves nothing: set enable=True and load_only=False in the checkpoint config"
        )
    values = {one.name: getattr(config, one.name) for one in fields(config) if one.init}
    return _manager(base, type(config)).Config(**values)


def _manager(base: Any, config_type: Any) -> Any:
    """Return a subclass of a checkpoint manager with a config of its own, as torchtitan asks."""

    class ElasticCheckpointManager(base):
        """Saves at its interval, and when all ranks agree to."""

        _is_elastic = True

        @dataclass(kw_only=True, slots=True)
        class Config(config_type):
            """As that of the manager below."""

        def __init__(self, config: Any, **about: Any) -> None:
            super().__init__(config, **about)
            self._saves_now = False
            self._unsealed = -1  # step of an async save that may be under way
            self._loop: OwnLoop | None = OwnLoop() if self.enable else None
            if self._loop is not None:
                self._loop.watch(_pattern(self.folder), COMPLETE_WHEN)

        def load(self, step: int = -1) -> bool:
            loaded: bool = super().load(step)
            if self._loop is not None:
                self._loop.begin(int(getattr(self.states[_TRAIN_STATE], "step", 0)))
            return loaded

        def save(self, curr_step: int, last_step: bool = False) -> bool:
            loop = self._loop
            if loop is None or curr_step == 0:  # 0: a seed checkpoint, before any step
                return bool(super().save(curr_step, last_step))
            action = loop.after_step(curr_step)
            self._saves_now = action is not ActionKind.GO
            if self._should_save(curr_step, last_step):
                self._seal_earlier(loop)
            saved: bool = super().save(curr_step, last_step)
            if saved and (self._saves_now or last_step or self.save_future is None):
                self._wait()
                loop.saved(curr_step)
            elif saved:
                self._unsealed = curr_step
            if action is ActionKind.STOP and not last_step:
                self.close()
                loop.leave()
            return saved

        def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
            return self._saves_now or bool(super()._should_save(curr_step, last_step))

        def _seal_earlier(self, loop: OwnLoop) -> None:
            if self._unsealed >= 0:
                self._wait()
                loop.saved(self._unsealed)
                self._unsealed = -1

        def _wait(self) -> None:
            self.maybe_wait_for_staging()
            self.maybe_wait_for_saving()

    return ElasticCheckpointManager


def _pattern(folder: str) -> str:
    if "://" in folder:
        raise UsageError(
            f"checkpoint folder {folder} is remote, and cannot be sealed: give one on a file system"
        )
    return f"{Path(folder).absolute()}/step-*"

"""A checkpoint manager with the interface of torchtitan's, which does not import everywhere."""

from __future__ import annotations

import re
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp


class CheckpointManager:
    @dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None
        enable: bool = False
        folder: str = "checkpoint"
        interval: int = 500
        last_save_model_only: bool = True
        load_only: bool = False
        async_mode: str = "disabled"

        def build(self, **about: Any) -> Any:
            return type(self)._owner(config=replace(self), **about)

    def __init_subclass__(cls, **about: Any) -> None:
        super().__init_subclass__(**about)
        if "Config" in cls.__dict__:
            cls.Config._owner = cls

    def __init__(
        self, config: Any, *, model_parts: Any, states: dict[str, Any], base_folder: str = "",
        **others: Any,
    ) -> None:  # fmt: skip
        self.enable, self.load_only, self.interval = (
            config.enable,
            config.load_only,
            config.interval,
        )
        self.folder = f"{base_folder}/{config.folder}"
        self.states, self.model = states, model_parts[0]
        self.states |= {
            "optimizer": others["optimizers"],
            "lr_scheduler": others["lr_schedulers"],
            "dataloader": others["dataloader"],
        }
        self.save_future: Future[Any] | None = None
        self.is_async = config.async_mode != "disabled"
        self.group = dist.new_group(backend="gloo") if self.is_async else None

    def _content(self) -> dict[str, Any]:
        return {**self.states, **self.model.state_dict()}

    def load(self, step: int = -1) -> bool:
        steps = [
            int(found[1])
            for path in Path(self.folder).glob("step-*/.metadata")
            if (found := re.fullmatch(r"step-(\d+)", path.parent.name))
        ]
        if not steps:
            return False
        content = self._content()
        dcp.load(content, checkpoint_id=f"{self.folder}/step-{max(steps)}")
        self.model.load_state_dict(content, strict=False)
        return True

    def save(self, curr_step: int, last_step: bool = False) -> bool:
        if not self._should_save(curr_step, last_step):
            return False
        self.maybe_wait_for_saving()
        place = f"{self.folder}/step-{curr_step}"
        if self.is_async and not last_step:
            self.save_future = dcp.async_save(
                self._content(), checkpoint_id=place, process_group=self.group
            )
        else:
            dcp.save(self._content(), checkpoint_id=place)
        return True

    def _should_save(self, curr_step: int, last_step: bool = False) -> bool:
        return self.enable and (last_step or curr_step % self.interval == 0)

    def maybe_wait_for_staging(self) -> None:
        return

    def maybe_wait_for_saving(self) -> None:
        if self.save_future is not None:
            self.save_future.result()
            self.save_future = None

    def close(self) -> None:
        return


CheckpointManager.Config._owner = CheckpointManager

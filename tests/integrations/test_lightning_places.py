"""A stop after every single step of a fit, in this process: samples, hooks and bits as undisturbed.

The step agreement and the supervisor are left out: ``test_lightning.py`` has them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from elastic_ckpt.errors import UsageError
from elastic_ckpt.protocol.agreement import ActionKind

pl = pytest.importorskip("pytorch_lightning")
stateful = pytest.importorskip("torchdata.stateful_dataloader")
ElasticCallback = import_module("elastic_ckpt.integrations.lightning").ElasticCallback

SAMPLES = 22


class Rows(Dataset):
    """Draws random numbers while it is read, as augmentation does."""

    def __init__(self, noise: float = 0.1) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, Any]:
        noise = torch.rand(4) * self.noise if self.noise else 0.0
        return index, torch.randn(4, generator=torch.Generator().manual_seed(index)) + noise


class Stream(IterableDataset):
    def __init__(self) -> None:
        self.at, self.is_placed = 0, False

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        self.at, self.is_placed = self.at if self.is_placed else 0, False
        return self._read()

    def _read(self) -> Iterator[tuple[int, Any]]:
        while self.at < SAMPLES:
            self.at += 1
            yield Rows(0.0)[self.at - 1]


class StatefulStream(Stream):
    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.is_placed = state["at"], True


class Model(pl.LightningModule):
    def __init__(self, *, plateau: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.plateau = plateau
        self.trace: list[Any] = []

    def training_step(self, batch: Any, index: int) -> Any:
        numbers, inputs = batch
        self.trace.append((self.current_epoch, index, numbers.tolist()))
        loss = (self.layers(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss)
        return loss * (1 + random.random() + numpy.random.rand())

    def validation_step(self, batch: Any, index: int) -> None:
        self.trace.append(("validation", self.current_epoch, index))

    def on_train_epoch_end(self) -> None:
        self.trace.append(("end of epoch", self.current_epoch))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        schedules = torch.optim.lr_scheduler
        if self.plateau:
            schedule = schedules.ReduceLROnPlateau(optimizer, patience=0)
            return {"optimizer": optimizer, "lr_scheduler": schedule, "monitor": "loss"}
        schedule = schedules.LambdaLR(optimizer, lambda step: 0.95**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Left(Exception):
    pass


@dataclass
class StopsAt:
    """Stands in for the agreement: all ranks stop after one step."""

    step: int

    def begin(self, step: int) -> None:
        pass

    def after_step(self, step: int) -> ActionKind:
        return ActionKind.STOP if step == self.step else ActionKind.GO

    def saved(self, step: int) -> None:
        pass

    def leave(self) -> None:
        raise Left


@dataclass
class Case:
    loader: Callable[[], Any]
    trainer: dict[str, Any] = field(default_factory=dict)
    validates: bool = False
    plateau: bool = False

    def fit(
        self, directory: Path, stop: int = -1, resume: str | None = None, *, callback: bool = True
    ) -> tuple[Model, Any, bool]:
        pl.seed_everything(1 if resume is None else 99, verbose=False)
        model = Model(plateau=self.plateau)
        elastic = ElasticCallback(directory=directory)
        elastic._loop, elastic._directory = StopsAt(stop), directory
        loader = self.loader()
        options = {"max_epochs": 2, "accumulate_grad_batches": 2} | self.trainer
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, callbacks=[elastic] if callback else [], logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            **options,
        )  # fmt: skip
        validation = DataLoader(Rows(0.0), batch_size=11) if self.validates else None
        try:
            trainer.fit(model, loader, validation, ckpt_path=resume)
        except Left:
            return model, trainer, True
        return model, trainer, False


def shuffled(**options: Any) -> DataLoader:
    return DataLoader(Rows(), batch_size=4, shuffle=True, **options)


CASES = {
    "shuffled": Case(shuffled),
    "validation within epochs": Case(shuffled, {"val_check_interval": 2}, validates=True),
    "validation of epochs": Case(shuffled, validates=True),
    "plateau": Case(shuffled, plateau=True),
    "generator": Case(lambda: shuffled(generator=torch.Generator().manual_seed(3))),
    "max_steps": Case(shuffled, {"max_steps": 5, "max_epochs": -1}),
    "limited": Case(shuffled, {"limit_train_batches": 3, "max_epochs": 3}),
    "weighted": Case(
        lambda: DataLoader(
            Rows(), batch_size=4, sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES)
        )
    ),
    "workers": Case(lambda: DataLoader(Rows(0.0), batch_size=4, shuffle=True, num_workers=1)),
    "stream": Case(lambda: DataLoader(Stream(), batch_size=4)),
    "stateful": Case(lambda: stateful.StatefulDataLoader(Rows(), batch_size=4, shuffle=True)),
    "stateful stream": Case(lambda: stateful.StatefulDataLoader(StatefulStream(), batch_size=4)),
    "stateful stream, workers": Case(
        lambda: stateful.StatefulDataLoader(StatefulStream(), batch_size=4, num_workers=1)
    ),
}


@pytest.fixture(autouse=True)
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_CKPT_DIR", str(tmp_path / "job"))
    monkeypatch.setattr("elastic_ckpt.training.runtime._current", None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_stop_after_any_step_changes_nothing(case: Case, tmp_path: Path) -> None:
    plain, _, _ = case.fit(tmp_path, callback=False)
    whole, trainer, _ = case.fit(tmp_path)
    assert whole.trace == plain.trace
    assert same_weights(whole, plain)
    for step in range(1, trainer.global_step + 1):
        first, _, left = case.fit(tmp_path, step)
        if not left:  # nothing was left to do
            assert first.trace == whole.trace and step == trainer.global_step
            continue
        path = str(tmp_path / f"step-{step:08d}" / "lightning.ckpt")
        second, resumed, _ = case.fit(tmp_path, resume=path)
        assert first.trace + second.trace == whole.trace, step
        assert same_weights(second, whole), step
        assert (resumed.global_step, resumed.current_epoch) == (
            trainer.global_step, trainer.current_epoch,
        )  # fmt: skip


def same_weights(one: Model, other: Model) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        callbacks=[ElasticCallback(), ElasticCallback()], enable_progress_bar=False,
    )  # fmt: skip
    with pytest.raises(UsageError, match="two ElasticCallback"):
        trainer.fit(Model(plateau=False), shuffled())


def test_a_trainer_of_fewer_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    case = Case(shuffled)
    with pytest.raises(UsageError, match="1 of 2 processes"):
        case.fit(Path())


def test_an_old_lightning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_ckpt.integrations.lightning._lightning.__version__", "2.1.4")
    with pytest.raises(UsageError, match=r"Lightning 2.1.4 is too old"):
        ElasticCallback()


def test_no_checkpoint_is_no_path_to_resume_from() -> None:
    assert ElasticCallback.newest() is None


def test_a_model_checkpoint_beside_it_resumes_exactly_too(tmp_path: Path) -> None:
    """Any checkpoint of the Trainer's holds what the callback adds."""
    directory = str(tmp_path / "own")
    saver = pl.callbacks.ModelCheckpoint(directory, every_n_train_steps=2, save_top_k=-1)
    case = Case(shuffled, {"accumulate_grad_batches": 1})
    whole, _, _ = case.fit(tmp_path)
    elastic = ElasticCallback(directory=tmp_path)
    elastic._loop, elastic._directory = StopsAt(-1), tmp_path
    pl.seed_everything(1, verbose=False)
    model = Model(plateau=False)
    pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, enable_progress_bar=False,
        callbacks=[saver, elastic],
    ).fit(model, shuffled())  # fmt: skip
    assert same_weights(model, whole)
    second, _, _ = case.fit(tmp_path, resume=f"{directory}/epoch=1-step=8.ckpt")
    assert second.trace == whole.trace[9:]
    assert same_weights(second, whole)

"""What a script reports, and which checkpoints say so."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from elastic_ckpt.checkpoint.verify import read_manifest
from elastic_ckpt.errors import NonFiniteLoss, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.slot import Source
from elastic_ckpt.training.session import Session
from elastic_ckpt.training.state import rank_state
from elastic_ckpt.training.state.candidate import Loaded
from tests.checkpoints import make_checkpoint, open_job


@pytest.fixture
def session() -> Session:
    made = Session("unused", model=nn.Linear(1, 1))
    made._runtime = SimpleNamespace(  # type: ignore[assignment]
        peers=SimpleNamespace(rank=0, world_size=1), job=JobDirectory(Path("unused"))
    )
    made._saver = SimpleNamespace(last=(-1, -1))  # type: ignore[assignment]
    return made


def said(session: Session) -> dict[str, float]:
    return session._snapshot("interval").metrics


def test_the_last_word_counts_for_each_metric(session: Session) -> None:
    assert said(session) == {}
    session.report(loss=2.0, accuracy=0.5)
    session.report(loss=1)
    assert said(session) == {"loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize("nothing", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_takes_the_old_one_away(session: Session, nothing: float) -> None:
    """An old value would make a checkpoint of a model that diverged one of the best."""
    session.report(accuracy=1.0, other=2.0)
    session.report(accuracy=nothing)
    assert said(session) == {"other": 2.0}


@pytest.mark.parametrize("nothing", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_a_loss_that_is_no_number_is_a_failure(session: Session, nothing: float) -> None:
    session.report(loss=1.0)
    with pytest.raises(NonFiniteLoss, match="the loss of step 1 is"):
        session.report(loss=nothing)
    assert said(session) == {}


def test_a_tensor_is_a_number_too(session: Session) -> None:
    session.report(loss=torch.tensor(0.25, requires_grad=True))  # type: ignore[arg-type]
    assert said(session) == {"loss": 0.25}
    assert type(said(session)["loss"]) is float


def test_a_later_report_does_not_change_what_is_being_saved(session: Session) -> None:
    session.report(loss=1.0)
    before = said(session)
    session.report(loss=2.0)
    assert before == {"loss": 1.0}


def test_a_restart_remembers_the_last_word(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run without an interruption would: it may be long until the next evaluation."""
    monkeypatch.setattr(rank_state, "read_rank_state", lambda *_: None)
    path = make_checkpoint(open_job(tmp_path / "job"), metrics={"loss": 1.0, "accuracy": 0.5})
    session._resume(Loaded(path, read_manifest(path), Source.DISK))
    assert said(session) == {"loss": 1.0, "accuracy": 0.5}
    session.report(loss=3.0)
    assert said(session) == {"loss": 3.0, "accuracy": 0.5}


@pytest.mark.parametrize("value", ["low", None, [1.0, 2.0]])
def test_something_else_is_a_wrong_call(session: Session, value: object) -> None:
    with pytest.raises(UsageError, match="loss"):
        session.report(loss=value)  # type: ignore[arg-type]


def test_a_rule_that_is_none_is_a_wrong_call() -> None:
    """It would fail in a thread, long after, where nobody sees it."""
    with pytest.raises(UsageError, match="Retention"):
        Session("unused", model=nn.Linear(1, 1), retention=2)  # type: ignore[arg-type]

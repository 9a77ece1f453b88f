"""What a script reports, and which values its checkpoints contain."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from elastic_ckpt.errors import NonFiniteLoss, UsageError
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.training.reported_metrics import ReportedMetrics
from elastic_ckpt.training.session import Session


@pytest.fixture
def metrics() -> ReportedMetrics:
    return ReportedMetrics()


def test_the_newest_value_of_each_metric_counts(metrics: ReportedMetrics) -> None:
    assert metrics.values == {}
    metrics.report(1, {"loss": 2.0, "accuracy": 0.5})
    metrics.report(2, {"loss": 1})
    assert metrics.values == {"loss": 1.0, "accuracy": 0.5}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_removes_the_old_one(
    metrics: ReportedMetrics, value: float
) -> None:
    """An old value could make a checkpoint of a model that diverged one of the best."""
    metrics.report(1, {"accuracy": 1.0, "other": 2.0})
    metrics.report(2, {"accuracy": value})
    assert metrics.values == {"other": 2.0}


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_a_loss_that_is_not_finite_is_a_failure(metrics: ReportedMetrics, value: float) -> None:
    metrics.report(1, {"loss": 1.0})
    with pytest.raises(NonFiniteLoss, match="the loss of step 2 is"):
        metrics.report(2, {"loss": value})
    assert metrics.values == {}


def test_a_tensor_is_accepted(metrics: ReportedMetrics) -> None:
    metrics.report(1, {"loss": torch.tensor(0.25)})  # type: ignore[dict-item]
    assert metrics.values == {"loss": 0.25}
    assert type(metrics.values["loss"]) is float


def test_a_later_report_does_not_change_what_is_being_saved(metrics: ReportedMetrics) -> None:
    metrics.report(1, {"loss": 1.0})
    before = metrics.values
    metrics.report(2, {"loss": 2.0})
    assert before == {"loss": 1.0}


def test_a_restart_starts_from_the_checkpoints_values(metrics: ReportedMetrics) -> None:
    """The next evaluation may be far away; a value from before the resume counts more."""
    metrics.report(1, {"accuracy": 0.75})
    metrics.resume({"loss": 1.0, "accuracy": 0.5})
    assert metrics.values == {"loss": 1.0, "accuracy": 0.75}
    metrics.report(2, {"loss": 3.0})
    assert metrics.values == {"loss": 3.0, "accuracy": 0.75}


@pytest.mark.parametrize("value", ["low", None, [1.0, 2.0]])
def test_a_value_that_is_not_a_number_is_a_usage_error(
    metrics: ReportedMetrics, value: object
) -> None:
    with pytest.raises(UsageError, match="loss"):
        metrics.report(1, {"loss": value})  # type: ignore[dict-item]


def test_status_sees_the_values(metrics: ReportedMetrics) -> None:
    board = Board.private()
    metrics.slot = board.rank_slot(0)
    metrics.report(1, {"loss": 0.5})
    assert board.read_slot(0).metrics == {"loss": 0.5}


def test_a_session_reports_before_it_is_entered() -> None:
    with pytest.raises(NonFiniteLoss, match="the loss of step 1 is nan"):
        Session("unused", model=nn.Linear(1, 1)).report(loss=math.nan)


def test_a_retention_of_another_type_is_a_usage_error() -> None:
    """It would fail in a thread, long after."""
    with pytest.raises(UsageError, match="Retention"):
        Session("unused", model=nn.Linear(1, 1), retention=2)  # type: ignore[arg-type]

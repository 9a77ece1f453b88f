"""A rank's error is the same error on every rank, whatever its class."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import elastic_ckpt.checkpoint.ownership.read_lock
import elastic_ckpt.checkpoint.tier  # noqa: F401 -- both define errors
from elastic_ckpt.errors import (
    BucketFailed,
    BucketRefused,
    ElasticCkptError,
    RunSuperseded,
    SaveFailed,
    StorageFailed,
)
from elastic_ckpt.training.ranks.rank_errors import as_failure, decode_failure, encode_failure


def subclasses(kind: type[ElasticCkptError]) -> Iterator[type[ElasticCkptError]]:
    for found in kind.__subclasses__():
        if found.__module__.startswith("elastic_ckpt."):
            yield found
        yield from subclasses(found)


@pytest.mark.parametrize("kind", list(subclasses(ElasticCkptError)), ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_itself(kind: type[ElasticCkptError]) -> None:
    saves = issubclass(kind, SaveFailed)
    sent = kind(3, "no room: none", "write x") if saves else kind("no room: none")
    arrived = decode_failure(b"!" + encode_failure(sent, 3))
    assert type(arrived) is kind
    assert str(arrived) == str(sent)
    assert not isinstance(arrived, SaveFailed) or arrived.rank == 3


@pytest.mark.parametrize("error", [BucketFailed("no answer"), BucketRefused("denied"), OSError(5)])
def test_a_storage_that_fails_a_save_lets_the_job_train_on(error: Exception) -> None:
    assert isinstance(as_failure(1, error, "save"), StorageFailed)


def test_a_run_that_was_taken_over_learns_that() -> None:
    assert isinstance(as_failure(1, RunSuperseded("another"), "save"), RunSuperseded)

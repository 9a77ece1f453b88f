"""Owners of a bucket under the simulation; without a rule that keeps them apart it must fail."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
from elastic_ckpt.checkpoint.bucket.store import Bucket
from tests.simulation.bucket import simulate

SEEDS = 200
MOST = 2000
"""Seeds in which a missing rule must show."""


def test_no_schedule_loses_what_was_called_saved() -> None:
    assert {seed: why for seed in range(1, SEEDS) if (why := simulate(seed))} == {}


def test_a_seed_replays() -> None:
    logs: list[list[str]] = [[], []]
    for log in logs:
        assert simulate(7, log) is None
    assert logs[0] == logs[1]
    assert len(logs[0]) > 50


def without_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BucketClaim, "check", lambda _: None)


def without_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks' leader and the drain each write down what they know."""
    monkeypatch.setattr(BucketClaim, "alone", lambda _: contextlib.nullcontext())


def without_the_claim_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seals are ordered by their step alone."""
    monkeypatch.setattr(SealKey, "age", property(lambda key: (0, key.epoch, key.step)))
    parse, of = SealKey.parse, SealKey.key.fget
    assert of is not None

    def flat(key: SealKey) -> str:
        return of(SealKey(key.session, 1, key.epoch, key.step, f"{key.attempt}c{key.claim}"))

    def back(session: str, text: str) -> SealKey | None:
        found = parse(session, text)
        if found is None:
            return None
        attempt, _, claim = found.attempt.rpartition("c")
        return SealKey(session, int(claim), found.epoch, found.step, attempt)

    monkeypatch.setattr(SealKey, "key", property(flat))
    monkeypatch.setattr(SealKey, "parse", staticmethod(back))


def without_the_word_of_the_last_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only listings tell what is there."""
    newest = catalog.newest

    def listed(store: Bucket, session: str = "", told: Mapping[str, str] | None = None) -> Any:
        del told
        return newest(store, session, {})

    monkeypatch.setattr(catalog, "newest", listed)


@pytest.mark.parametrize(
    ("rule", "first"),
    [
        (without_the_check, 1),
        (without_the_lock, 400),
        (without_the_claim_in_the_key, 1200),
        (without_the_word_of_the_last_owner, 1),
    ],
)
def test_without_a_rule_work_is_lost(
    monkeypatch: pytest.MonkeyPatch, rule: Any, first: int
) -> None:
    """The search starts at a seed shortly before the one that is known to lose something."""
    rule(monkeypatch)
    assert any(simulate(seed) for seed in range(first, first + MOST))

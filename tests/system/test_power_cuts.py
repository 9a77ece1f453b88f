"""Power cuts of ext4, xfs and btrfs: what was reported sealed is there, nothing else is loaded.

A job saves in a guest whose kernel records every write of its disk; disks that a power cut would
have left are then mounted here. ``POWER_CUT_STATES`` is how many of each file system.
"""

from __future__ import annotations

import os
import time

import pytest

from tests.power_cuts import Case, Outcome, outcomes, why_not

SEED = int(os.environ.get("ELASTIC_CKPT_TEST_SEED", "20261129"))
STATES = int(os.environ.get("POWER_CUT_STATES", "20"))
CONTROL_STATES = 8
CONTROL_STEPS = 4

SOUND = [Case(kind, "rw", "on", STATES) for kind in ("ext4", "xfs", "btrfs")]
if STATES >= 100:
    SOUND.append(Case("ext4", "data=writeback", "on", STATES))
LOSING = [
    Case("ext4", "nobarrier", "on", CONTROL_STATES, CONTROL_STEPS),
    Case("xfs", "rw", "off", CONTROL_STATES, CONTROL_STEPS),
    Case("ext4", "rw", "directories", CONTROL_STATES, CONTROL_STEPS),
    Case("btrfs", "nobarrier", "on", CONTROL_STATES, CONTROL_STEPS),
]

SECONDS = 240.0 + 1.5 * STATES * len(SOUND)
"""All of it is killed after that; a tenth to a third of it is usual."""

pytestmark = [
    pytest.mark.timeout(SECONDS + 30.0),
    pytest.mark.one_torch,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "they can be cut"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All cases, which share a guest."""
    begun = time.monotonic()
    found = outcomes(tmp_path_factory.mktemp("room"), [*SOUND, *LOSING], SEED, SECONDS)
    print(f"\nseed {SEED}, {time.monotonic() - begun:.0f} s", *found, sep="\n  ")
    return {one.name: one for one in found}


@pytest.mark.parametrize("case", SOUND, ids=lambda case: f"{case.kind}-{case.options}")
def test_what_was_reported_sealed_survives(found: dict[str, Outcome], case: Case) -> None:
    outcome = found[case.name]
    assert outcome.states == STATES and outcome.flushes > 100
    assert len(outcome.reported) >= 5, "the cuts came all at the same time"
    assert not outcome.bad, f"{outcome}\n" + "\n".join(outcome.bad[:10])


@pytest.mark.parametrize(
    "case", LOSING, ids=lambda case: f"{case.kind}-{case.options}-{case.fsync}"
)
def test_a_disk_that_loses_what_was_synced_is_noticed(
    found: dict[str, Outcome], case: Case
) -> None:
    """The control: without this the other tests prove nothing."""
    outcome = found[case.name]
    assert len(outcome.bad) >= CONTROL_STATES // 2, outcome

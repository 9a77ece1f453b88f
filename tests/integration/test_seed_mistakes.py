"""Mistakes of ColossalChat's applications: shown on a loop like theirs, absent in ours."""

import json
import os
import time
from pathlib import Path

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from tests.integration.ranks import run_ranks
from tests.marks import slow
from tests.seed import BATCH, SAMPLES

pytestmark = pytest.mark.one_torch


def loop(rank, kind, directory, epochs, stop_after=10**6, **options):
    from tests import seed

    return getattr(seed, kind)(directory, **options).run(epochs, stop_after)


def run(kind, directory, epochs, ranks=1, stop_after=10**6, **options):
    """Return what each rank used."""
    results = run_ranks(_loop, ranks, kind, str(directory), epochs, stop_after, options)
    assert not any(isinstance(result, int | tuple) for result in results), results
    return results


def _loop(rank, kind, directory, epochs, stop_after, options):
    return loop(rank, kind, directory, epochs, stop_after, **options)


def samples(results, epoch):
    return [sample for used in results for sample in used.in_epoch(epoch)]


EVERY = list(range(SAMPLES))


# -- where in the data ------------------------------------------------------------------------


def used_across_a_resume(kind, directory):
    """Save after step 4, end after step 6, and resume to the end of the epoch."""
    (before,) = run(kind, directory, 1, stop_after=6, every=4)
    (after,) = run(kind, directory, 1)
    return before.in_epoch(0)[: 4 * BATCH] + after.in_epoch(0)


def test_no_batch_is_skipped(tmp_path):
    """The step is incremented before it is saved."""
    assert len(used_across_a_resume("SeedLoop", tmp_path / "seed")) == SAMPLES - BATCH
    assert sorted(used_across_a_resume("OurLoop", tmp_path / "ours")) == EVERY


def epochs_behind_a_resume(kind, directory):
    run(kind, directory, 3, stop_after=6, every=4)
    (after,) = run(kind, directory, 3)
    return [len(after.in_epoch(epoch)) for epoch in (1, 2)]


@pytest.mark.slow
def test_later_epochs_use_every_sample(tmp_path):
    """The start index is that of one epoch."""
    assert epochs_behind_a_resume("SeedLoop", tmp_path / "seed") == [SAMPLES - 5 * BATCH] * 2
    assert epochs_behind_a_resume("OurLoop", tmp_path / "ours") == [SAMPLES] * 2


@pytest.mark.slow
def test_a_save_in_a_later_epoch_is_in_that_epoch(tmp_path):
    """Steps counted from the start of the job exceed every epoch but the first."""
    resumed = {}
    for kind in ("SeedLoop", "OurLoop"):
        run(kind, tmp_path / kind, 2, stop_after=14, every=14)  # two steps into epoch 1
        (after,) = run(kind, tmp_path / kind, 2)
        resumed[kind] = len(after.in_epoch(1))
    assert resumed == {"SeedLoop": 0, "OurLoop": SAMPLES - 2 * BATCH}


@pytest.mark.slow
def test_each_epoch_has_an_order_of_its_own(tmp_path):
    """Nobody names the epoch to the sampler."""
    for kind, alike in (("SeedLoop", True), ("OurLoop", False)):
        (used,) = run(kind, tmp_path / kind, 2)
        assert (used.in_epoch(0) == used.in_epoch(1)) is alike


@pytest.mark.slow
def test_order_of_an_epoch_is_the_same_after_a_resume(tmp_path):
    (unbroken,) = run("OurLoop", tmp_path / "whole", 3)
    run("OurLoop", tmp_path / "broken", 3, stop_after=17, every=5)
    (after,) = run("OurLoop", tmp_path / "broken", 3)
    assert unbroken.samples[15 * BATCH :] == after.samples


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3)])
def test_other_world_size_resumes_at_the_same_sample(tmp_path, before, after):
    """The index counts samples of one rank, of however many there are."""
    found = {}
    for kind in ("SeedLoop", "OurLoop"):
        first = run(kind, tmp_path / kind, 1, before, stop_after=5, every=5)
        ran = samples(run(kind, tmp_path / kind, 1, after), 0)
        found[kind] = samples(first, 0) + ran
    assert sorted(found["SeedLoop"]) != EVERY
    assert set(found["OurLoop"]) == set(EVERY)
    padding = -(SAMPLES - 5 * BATCH * before) % after
    assert len(found["OurLoop"]) == SAMPLES + padding


@pytest.mark.slow
def test_step_count_continues_after_a_resume(tmp_path):
    """A second checkpoint of the same step would overwrite the first."""
    for kind, twice in (("SeedLoop", {5}), ("OurLoop", set())):
        (before,) = run(kind, tmp_path / kind, 1, stop_after=4, every=4)
        (after,) = run(kind, tmp_path / kind, 1, every=4)
        assert set(before.steps_saved) & set(after.steps_saved) == twice


@pytest.mark.slow
def test_random_state_continues_after_a_resume(tmp_path):
    """A resumed step draws the same numbers."""
    for kind, exact in (("SeedLoop", False), ("OurLoop", True)):
        (unbroken,) = run(kind, tmp_path / f"{kind}-whole", 2)
        run(kind, tmp_path / kind, 2, stop_after=4, every=4)
        (after,) = run(kind, tmp_path / kind, 2)
        assert (unbroken.draws[4:] == after.draws) is exact


# -- when it is saved -------------------------------------------------------------------------


@pytest.mark.slow
def test_notice_within_an_epoch_loses_no_step(tmp_path):
    """Only our loop has a checkpoint to resume from."""
    run("SeedLoop", tmp_path / "seed", 1, stop_after=7)
    assert not (tmp_path / "seed").exists()
    ended = run_ranks(_loop, 1, "OurLoop", str(tmp_path / "ours"), 1, 10**6, {"notice_at": 7})
    assert ended == [75]
    assert [path.name for path in (tmp_path / "ours").glob("epoch-*")] == ["epoch-0_step-7"]


# -- whether it is complete -------------------------------------------------------------------


def save_and_die(rank, kind, directory):
    """The rank dies when it reaches its optimizer, after it wrote the model."""
    from tests import seed

    running = getattr(seed, kind)(directory)
    booster = running.state[0]
    plain = booster.save_optimizer

    def slow(*args, **options):
        if rank == 0:
            os._exit(9)
        return plain(*args, **options)

    booster.save_optimizer = slow
    booster.checkpoint_io.save_optimizer = slow
    if kind == "OurLoop":
        from colossalai.checkpoint_io import GeneralCheckpointIO

        GeneralCheckpointIO.save_optimizer = slow
        running.resume()
    list(running.sampler)
    running.save(0, 5)


@pytest.mark.parametrize("kind", [slow("SeedLoop"), "OurLoop"])
def test_killed_save_over_an_older_one_does_not_mix_them(tmp_path, kind):
    """The seed's mixes new weights with old moments, and loads without an error."""
    place = tmp_path / "epoch-0_step-5"
    run(kind, tmp_path, 1, stop_after=5, every=4 if kind == "SeedLoop" else 5)
    before = content(place)
    run_ranks(save_and_die, 1, kind, str(tmp_path))
    changed = {name for name, data in content(place).items() if before.get(name) != data}
    if kind == "SeedLoop":
        assert any(name.startswith("modeling/") for name in changed)
        assert not any(name.startswith("optimizer/") for name in changed)
        assert json.loads((place / "running_states.json").read_text())["step"] == 5
    else:
        assert not changed
    (after,) = run(kind, tmp_path, 1, stop_after=1)
    assert after.samples  # it loaded


def content(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def fail_while_saving(rank, kind, directory):
    """Fail rank 0's save; return how rank 1's wait in the next step ends."""
    import torch.distributed as dist

    from tests import seed

    running = getattr(seed, kind)(directory)
    if kind == "OurLoop":
        running.resume()
    list(running.sampler)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    if rank == 0:
        from colossalai.checkpoint_io import GeneralCheckpointIO

        GeneralCheckpointIO.save_sharded_model = full
    began = time.monotonic()
    try:
        running.save(0, 5)
        if rank == 1:
            dist.barrier()  # the next step's all-reduce
    except Exception as error:
        if rank == 0 and kind == "SeedLoop":
            time.sleep(90)  # an except and a log line; the process stays
        return type(error).__name__, time.monotonic() - began < 45
    return "went on", True


@pytest.mark.slow
def test_failed_save_of_one_rank_does_not_block_the_other(tmp_path):
    _, other = run_ranks(fail_while_saving, 2, "OurLoop", str(tmp_path / "ours"))
    assert other[0] in ("SaveFailed", "StorageFailed") and other[1]
    _, waiting = run_ranks(fail_while_saving, 2, "SeedLoop", str(tmp_path / "seed"), seconds=6)
    assert waiting is None  # it waited until it was killed

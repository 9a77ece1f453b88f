"""The seed's functions on real ranks: errors reach every rank, no partial files remain."""

import errno
import os
import time

import pytest
import torch
from torch import nn

from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.integration.ranks import run_ranks


def build(value: float = 0.0):
    torch.manual_seed(3)
    model = nn.Linear(4, 2)
    nn.init.constant_(model.bias, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


def save(directory, step, value=0.0, epoch=0):
    from elastic_ckpt import save_checkpoint

    save_checkpoint(directory, None, *build(value), epoch, step, 4, None)


class Counter:
    """State of the script's own, for ``extra``."""

    def __init__(self, count):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


# -- what ranks do ----------------------------------------------------------------------------


def save_and_load_extra(rank, directory):
    """Each rank has a count of its own, and all have the same scale; one is asked for too much."""
    from elastic_ckpt import load_checkpoint, save_checkpoint

    own, shared = Counter(10 + rank), Counter(7)
    save_checkpoint(directory, None, *build(), 0, 5, 4, None, extra={"own": own, "shared": shared})
    own.count = shared.count = -1
    load_checkpoint(directory, None, *build(), extra={"own": own, "shared": shared})
    try:
        load_checkpoint(directory, None, *build(), extra={"ema": Counter(0)})
    except Exception as error:
        return own.count, shared.count, str(error)


def save_and_load(rank, directory):
    from elastic_ckpt import load_checkpoint

    save(directory, 5, value=1.0)
    save(directory, 6, value=2.0)
    model, optimizer, scheduler = build(9.0)
    place = load_checkpoint(directory, None, model, optimizer, scheduler)
    return place, model.bias.tolist(), build(2.0)[0].bias.tolist()


def save_sharded(rank, directory):
    """Save with an engine whose ranks write their own files, some of them not through the part."""
    from elastic_ckpt.training.engines.torch import engine as engines

    def sharded(self, path, part, copies):
        part.write(f"modeling/shard-{rank}.bin", b"model" * (rank + 1))
        import torch.distributed as dist

        dist.barrier()
        if rank == 1:  # an index, and a temporary file
            (path / "modeling" / "temporary.json").write_bytes(b"{}")
            (path / "modeling" / "index.json").write_bytes(b'{"shards": 2}')
            (path / "modeling" / "temporary.json").unlink()

    engines.TorchEngine.save = sharded
    engines.TorchEngine.by_path = True
    save(directory, 5)


def save_twice(rank, directory):
    from elastic_ckpt import load_checkpoint

    for value in (1.0, 7.0, 7.0):
        save(directory, 5, value=value)
    model, optimizer, scheduler = build(0.0)
    load_checkpoint(directory, None, model, optimizer, scheduler)
    return model.bias.tolist() == build(7.0)[0].bias.tolist()


def save_over_half_written(rank, directory):
    place = os.path.join(directory, "epoch-0_step-5")
    if rank == 0:
        os.makedirs(os.path.join(place, "modeling"))
    import torch.distributed as dist

    dist.barrier()
    save(directory, 5)
    return os.path.exists(os.path.join(place, "manifest.json"))


def fail_on_one_rank(rank, directory, failing_rank):
    """Fill one rank's disk for one save."""
    from elastic_ckpt.training.engines.torch import engine as engines

    original = engines.TorchEngine.save

    def full(self, path, part, copies):
        original(self, path, part, copies)  # after its collectives
        if rank == failing_rank:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "state")

    engines.TorchEngine.save = full
    reasons = []
    try:
        save(directory, 5)
    except Exception as error:
        reasons = [type(error).__name__, error.rank, error.reason]
    engines.TorchEngine.save = original
    save(directory, 6)
    return reasons


def fail_inside_a_collective(rank, directory):
    """Rank 1 raises while rank 0 waits for it in the engine's collective."""
    import torch.distributed as dist

    from elastic_ckpt.training.engines.torch import engine as engines

    def collective(self, path, part, copies):
        if rank == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        dist.barrier()

    engines.TorchEngine.save = collective
    began = time.monotonic()
    try:
        save(directory, 5)
    except Exception as error:
        return type(error).__name__, error.rank, time.monotonic() - began
    return "no error"


def fail_to_load(rank, directory, error):
    """Rank 1 fails to load while rank 0 is inside a collective or has loaded."""
    from elastic_ckpt import load_checkpoint
    from elastic_ckpt.training.engines.torch import engine as engines

    save(directory, 5)
    original = engines.TorchEngine.load

    def load(self, path):
        if rank == 1:
            raise error
        return original(self, path)

    engines.TorchEngine.load = load
    began = time.monotonic()
    try:
        load_checkpoint(directory, None, *build())
    except Exception as failed:
        return type(failed).__name__, str(failed), time.monotonic() - began
    return "no error"


def fail_to_seal(rank, directory):
    from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt

    def broken(self, header, files, retention):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    DiskAttempt.seal = broken
    save(directory, 5)


def load_damaged(rank, directory):
    from elastic_ckpt import load_checkpoint

    save(directory, 5, value=1.0)
    save(directory, 10, value=2.0)
    if rank == 0:
        path = os.path.join(directory, "epoch-0_step-10", "modeling", "00000.safetensors")
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([byte[0] ^ 1]))
    import torch.distributed as dist

    dist.barrier()
    model, optimizer, scheduler = build()
    return load_checkpoint(directory, None, model, optimizer, scheduler)


def load_hopeless(rank, directory):
    from elastic_ckpt import load_checkpoint

    for step in (5, 10, 15):
        save(directory, step)
    if rank == 0:
        for step in (5, 10, 15):
            os.truncate(f"{directory}/epoch-0_step-{step}/running_states.json", 3)
    import torch.distributed as dist

    dist.barrier()
    load_checkpoint(directory, None, *build())


# -- what must hold ----------------------------------------------------------------------------


def test_extra_objects_are_saved_per_rank(tmp_path):
    for rank, found in enumerate(run_ranks(save_and_load_extra, 2, str(tmp_path))):
        assert found[:2] == (10 + rank, 7)
        assert "epoch-0_step-5 has no state for extra='ema', as it was saved without" in found[2]


def test_newest_checkpoint_is_loaded(tmp_path):
    results = run_ranks(save_and_load, 2, str(tmp_path))
    for place, bias, expected in results:
        assert place == (0, 6, 24)  # the seed's units: step * batch_size, per rank
        assert bias == expected
    manifest = verify_full(tmp_path / "epoch-0_step-6")
    assert manifest.sample_start_index == 48  # all ranks together
    assert manifest.world_size == 2


def test_part_manifest_lists_the_files_of_its_rank(tmp_path):
    """Files not written through the part are claimed by the first rank that sees them."""
    assert run_ranks(save_sharded, 2, str(tmp_path)) == [None, None]
    manifest = verify_full(tmp_path / "epoch-0_step-5")
    assert {entry.path: entry.rank for entry in manifest.files} == {
        "modeling/shard-0.bin": 0,
        "modeling/shard-1.bin": 1,
        "modeling/index.json": 0,
        "running_states.json": 0,
        "parts/00000.json": 0,
        "parts/00001.json": 1,
        **{f"ranks/0000{rank}.{kind}": rank for rank in (0, 1) for kind in ("json", "safetensors")},
    }
    for path in (tmp_path / "epoch-0_step-5").rglob("*.*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_step_that_is_saved_again_holds_its_last_state(tmp_path):
    assert run_ranks(save_twice, 2, str(tmp_path)) == [True, True]
    assert not list((tmp_path / ".attempts").iterdir())


def test_half_written_step_is_quarantined(tmp_path):
    assert run_ranks(save_over_half_written, 2, str(tmp_path)) == [True, True]
    assert len(list((tmp_path / ".quarantine").glob("epoch-0_step-5-*.json"))) == 1


def test_full_disk_on_one_rank_is_an_error_on_all(tmp_path):
    for failing in (0, 1):
        directory = tmp_path / str(failing)
        results = run_ranks(fail_on_one_rank, 2, str(directory), failing)
        expected = ["StorageFailed", failing, "No space left on device: state"]
        assert results == [expected, expected]
        job = JobDirectory(directory)
        assert [path.name for path in directory.glob("epoch-*")] == ["epoch-0_step-6"]
        assert newest_intact(job).step == 6
        assert not list(job.attempts.iterdir())


def test_rank_stuck_in_a_collective_ends_with_an_error(tmp_path, capfd):
    stuck, (name, rank, seconds) = run_ranks(fail_inside_a_collective, 2, str(tmp_path))
    assert stuck == 70
    assert (name, rank) == ("StorageFailed", 1)
    assert seconds < 60
    assert "rank 0 is stuck in a collective since rank 1 could not save" in capfd.readouterr().err
    assert not list(tmp_path.glob("epoch-*"))


@pytest.mark.parametrize(
    ("error", "name", "text"),
    [
        (OSError(errno.EIO, "bad sector"), "StorageFailed", "rank 1 could not load: bad sector"),
        (RuntimeError("no such layer"), "CheckpointError", "does not fit epoch-0_step-5: no such"),
        (UsageError("wrong call"), "UsageError", "wrong call"),
    ],
)
def test_failed_load_on_one_rank_is_the_same_error_on_all(tmp_path, error, name, text):
    for found, message, seconds in run_ranks(fail_to_load, 2, str(tmp_path), error):
        assert found == name and text in message
        assert seconds < 60
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0_step-5"]


def test_failed_seal_is_an_error_on_all_ranks(tmp_path):
    results = run_ranks(fail_to_seal, 2, str(tmp_path))
    expected = ("StorageFailed", "rank 0 could not save: Read-only file system")
    assert results == [expected, expected]
    assert newest_intact(JobDirectory(tmp_path)) is None
    assert not list((tmp_path / ".attempts").iterdir())


def test_damaged_newest_checkpoint_is_replaced_by_the_previous_one(tmp_path):
    assert run_ranks(load_damaged, 2, str(tmp_path)) == [(0, 5, 20)] * 2
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0_step-5"]
    reason = next((tmp_path / ".quarantine").glob("*.json")).read_text()
    assert "modeling/00000.safetensors does not match its checksum" in reason


def test_two_damaged_checkpoints_in_a_row_stop_the_job(tmp_path):
    for name, text in run_ranks(load_hopeless, 2, str(tmp_path)):
        assert name == "NoUsableCheckpoint"
        assert "2 checkpoints in a row" in text
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0_step-5"]


def rewind(rank, directory):
    """Save two steps, go back to the first, and save a third and the second again."""
    from elastic_ckpt import load_checkpoint

    for step in (5, 6, 7):
        save(directory, step, value=float(step))
    load_checkpoint(f"{directory}/epoch-0_step-5", None, *build(0.0))
    left = sorted(path.name for path in JobDirectory.at(directory).root.glob("epoch-*"))
    save(directory, 6, value=60.0)
    model, optimizer, scheduler = build(0.0)
    place = load_checkpoint(directory, None, model, optimizer, scheduler)
    return left, place, model.bias.tolist(), build(60.0)[0].bias.tolist()


def test_going_back_to_an_older_checkpoint_leaves_the_branch(tmp_path):
    """A save holds its own bytes, and a restart goes on from the new branch."""
    from elastic_ckpt.checkpoint.lineage import superseded

    for left, place, bias, expected in run_ranks(rewind, 2, str(tmp_path)):
        assert left == ["epoch-0_step-5", "epoch-0_step-6", "epoch-0_step-7"]  # only looked at
        assert place[1] == 6
        assert bias == expected
    job = JobDirectory.at(tmp_path)
    assert newest_intact(job).step == 6
    assert sorted(entry.path.split("/")[-1][:14] for entry in superseded(job)) == [
        "epoch-0_step-6", "epoch-0_step-7",
    ]  # fmt: skip
    manifest = newest_intact(job).manifest
    assert manifest.run == 1 and manifest.parent != ""

"""Checkpoints of the booster: plain ColossalAI reads them, and nothing hostile is unpickled."""

import json
import os
import pickle

import pytest

pytest.importorskip("colossalai", reason="ColossalAI is not installed")

from elastic_ckpt.checkpoint.verify import verify_full
from tests.checkpoints import seal_again
from tests.integration.ranks import run_ranks
from tests.marks import slow


def boosted(value=0.0):
    import torch
    from colossalai.booster import Booster
    from colossalai.booster.plugin import TorchDDPPlugin
    from torch import nn

    booster = Booster(plugin=TorchDDPPlugin())
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    nn.init.constant_(model[1].bias, value)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    return booster, model, optimizer, scheduler


def train(booster, model, optimizer, scheduler, steps):
    import torch

    for step in range(steps):
        booster.backward(model(torch.full((2, 4), 1.0 + step)).sum(), optimizer)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def state_of(model, optimizer, scheduler):
    parameters = [p.detach().clone() for p in model.unwrap().parameters()]
    moments = [value["exp_avg"].clone() for value in optimizer.optim.state.values()]
    return parameters, moments, scheduler.get_last_lr()


def same(left, right):
    import torch

    return (
        all(map(torch.equal, left[0], right[0]))
        and all(map(torch.equal, left[1], right[1]))
        and left[2] == right[2]
    )


def save_ours(directory, steps=3):
    from elastic_ckpt import save_checkpoint

    objects = boosted()
    train(*objects, steps)
    save_checkpoint(directory, *objects, 0, steps, 2, None)
    return state_of(*objects[1:])


def read_by_plain_colossalai(rank, directory):
    from elastic_ckpt.training.engines.colossalai.cpu_shim import patch_loads

    expected = save_ours(directory)
    patch_loads()
    booster, model, optimizer, scheduler = boosted(5.0)
    place = os.path.join(directory, "epoch-0_step-3")
    booster.load_model(model, os.path.join(place, "modeling"))
    booster.load_optimizer(optimizer, os.path.join(place, "optimizer"))
    booster.load_lr_scheduler(scheduler, os.path.join(place, "lr_scheduler"))
    return same(state_of(model, optimizer, scheduler), expected)


def save_for_others(rank, directory):
    """Saves, and keeps what was saved where another number of ranks can compare with it."""
    import torch

    expected = save_ours(directory)
    if rank == 0:
        torch.save(expected, os.path.join(directory, "expected"))


def load_from_others(rank, directory):
    import torch

    from elastic_ckpt import load_checkpoint

    objects = boosted(5.0)
    place = load_checkpoint(directory, *objects)
    expected = torch.load(os.path.join(directory, "expected"), weights_only=True)
    found = same(state_of(*objects[1:]), expected)
    train(*objects, 1)
    return place, found


def needs_mending(rank):
    """Fails when ColossalAI's CPU accelerator has been fixed upstream."""
    import torch
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    try:
        CpuAccelerator().synchronize()
    except RuntimeError:
        return not torch.cuda.is_available()
    return False


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def load_hostile(rank, directory, part):
    """A checkpoint that verifies, because the attacker sealed it as well."""
    import torch.distributed as dist

    from elastic_ckpt import load_checkpoint

    save_ours(directory)
    place = os.path.join(directory, "epoch-0_step-3")
    mark = os.path.join(directory, "executed")
    if rank == 0:
        from pathlib import Path

        import torch

        root = Path(place)
        target = next(p for p in sorted(root.glob(part)) if p.suffix in (".bin", ""))
        torch.save(Hostile(mark), target)
        seal_again(root)
    dist.barrier()
    verify_full(__import__("pathlib").Path(place))
    try:
        load_checkpoint(place, *boosted())
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    else:
        outcome = "loaded"
    return outcome, os.path.exists(mark)


def large(buffer):
    """Files that are worth sharing; the buffer, a second MB, tells the ranks apart."""
    import torch
    from colossalai.booster import Booster
    from colossalai.booster.plugin import TorchDDPPlugin
    from torch import nn

    booster = Booster(plugin=TorchDDPPlugin())
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 600), nn.Linear(600, 600), nn.Linear(600, 2))
    model[2].weight = nn.Parameter(torch.zeros(600, 2).t())  # not contiguous
    if buffer is not None:
        model[0].register_buffer("seen", torch.full((600, 600), float(buffer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    return booster, model, optimizer, scheduler


def in_memory(directory, memory):
    """Have the saves of this process go to a memory tier."""
    from pathlib import Path

    import torch.distributed as dist

    from elastic_ckpt.checkpoint.memory.owned_tier import OwnedTier
    from elastic_ckpt.checkpoint.memory.owner import tier_path
    from elastic_ckpt.checkpoint.memory.tier import MemoryTier
    from elastic_ckpt.training.runtime import join

    runtime = join(directory)
    if dist.get_rank() == 0:
        OwnedTier(Path(memory), runtime.job, "node")
    dist.barrier()
    tier = MemoryTier(tier_path(Path(memory), runtime.job))
    runtime.memory = tier
    return tier


def cut_small():
    """Shards of 1 MB where ColossalAI makes them of 1024, so that there are several."""
    from colossalai.checkpoint_io import GeneralCheckpointIO

    for method in (GeneralCheckpointIO.save_model, GeneralCheckpointIO.save_optimizer):
        assert 1024 in method.__defaults__
        method.__defaults__ = tuple(1 if one == 1024 else one for one in method.__defaults__)


def leaves(path):
    import torch

    tree = torch.load(path, weights_only=True)
    return torch.utils._pytree.tree_flatten(tree)


def same_directory(ours, own):
    """Same names, indexes equal byte by byte, same structure and bits in every file."""
    import torch

    if sorted(p.name for p in ours.iterdir()) != sorted(p.name for p in own.iterdir()):
        return "other names"
    for path in own.iterdir():
        if path.suffix == ".json":
            if path.read_bytes() != (ours / path.name).read_bytes():
                return f"{path.name} differs"
            continue
        (left, shape), (right, other) = leaves(path), leaves(ours / path.name)
        if shape != other or len(left) != len(right):
            return f"{path.name} is made otherwise"
        for a, b in zip(left, right, strict=True):
            if isinstance(a, torch.Tensor):
                if not torch.equal(a, b) or a.stride() != b.stride() or a.dtype != b.dtype:
                    return f"{path.name} has other bits"
            elif a != b:
                return f"{path.name} has other values"
    return ""


def share_a_save(rank, directory, buffers, memory, full):
    """What differs from ColossalAI's own files, and which rank wrote which of ours."""
    from pathlib import Path

    import torch.distributed as dist

    from elastic_ckpt import save_checkpoint

    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    objects = large(rank if buffers else None)
    train(*objects, 2)
    if buffers:
        objects[1].unwrap()[0].seen.fill_(rank)
        cut_small()
    tier = in_memory(directory, memory) if memory else None
    if full and rank == 1:
        os.posix_fallocate = no_room
    for step in (1, 2, 3):
        save_checkpoint(directory, *objects, 0, step, 2, None)
        if tier is not None and rank == 0:
            for one in tier.sealed():
                one.generation.settle(one.seal)
        dist.barrier()
    own = Path(directory).parent / "own"
    most = 1 if buffers else 1024
    objects[0].save_model(objects[1], str(own / "modeling"), shard=True, size_per_shard=most)
    objects[0].save_optimizer(objects[2], str(own / "optimizer"), shard=True, size_per_shard=most)
    dist.barrier()
    if memory and not full:
        newest = tier.sealed()[0]
        root, files = newest.generation.path, newest.seal.files
    else:
        from elastic_ckpt.checkpoint.manifest import decode_manifest

        root = Path(directory) / "epoch-0_step-3"
        verify_full(root)
        files = decode_manifest((root / "manifest.json").read_bytes()).files
    differences = [same_directory(root / part, own / part) for part in ("modeling", "optimizer")]
    return differences, sorted((e.path, e.rank) for e in files if e.path.endswith(".bin"))


def no_room(*_):
    import errno

    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def counted(rank):
    from elastic_ckpt.training.engines import EngineInputs
    from elastic_ckpt.training.engines.colossalai.engine import ColossalAIEngine

    objects = large(None)
    train(*objects, 1)
    parameters = sum(p.nbytes for p in objects[1].unwrap().parameters())
    return ColossalAIEngine(EngineInputs(*objects)).state_bytes() / parameters


def unequal_replicas(rank, directory):
    """One rank's optimizer has no state yet: its files are others than rank 0's."""
    import torch.distributed as dist

    from elastic_ckpt import save_checkpoint

    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    objects = large(None)
    train(*objects, 1)
    if rank == 1:
        objects[2].optim.state.clear()
    try:
        save_checkpoint(directory, *objects, 0, 1, 2, None)
    except Exception as error:
        return type(error).__name__, str(error), sorted(os.listdir(directory))
    return "saved"


MODEL = "modeling/pytorch_model-00001.bin"
STATES = "optimizer/pytorch_optim-00001.bin"
GROUP = "optimizer/pytorch_optim_group.bin"


@pytest.mark.parametrize("memory, full", [slow(False, False), slow(True, False), (True, True)])
def test_replicas_share_the_writing(tmp_path, memory, full):
    """To the disk, to memory, and to the disk after one rank found no room in memory."""
    place = tmp_path / "memory"
    place.mkdir()
    arguments = str(tmp_path / "job"), False, str(place) if memory else "", full
    found = run_ranks(share_a_save, 2, *arguments)
    assert found == [(["", ""], [(MODEL, 0), (STATES, 1), (GROUP, 0)])] * 2


def test_per_replica_buffer_is_saved_from_rank_0(tmp_path):
    (differences, files), same_files = run_ranks(
        share_a_save, 2, str(tmp_path / "job"), True, "", False
    )
    assert differences == ["", ""]
    assert (differences, files) == same_files
    index = json.loads((tmp_path / "own/modeling/pytorch_model.bin.index.json").read_text())
    writers = dict(files)
    assert writers["modeling/" + index["weight_map"]["0.seen"]] == 0
    assert writers["modeling/" + index["weight_map"]["1.weight"]] == 1
    assert len(files) > 6


def test_optimizer_moments_count_in_the_forecast():
    assert run_ranks(counted, 1) == [pytest.approx(3.0, rel=0.01)]


def test_differing_replicas_are_not_saved(tmp_path):
    for outcome in run_ranks(unequal_replicas, 2, str(tmp_path)):
        name, reason, left = outcome
        assert name == "SaveFailed"
        assert "rank 1" in reason and "other files" in reason
        assert not any(entry.startswith("epoch") for entry in left)


BOMBS = ("modeling/*.bin", "optimizer/*.bin", "optimizer/*group*", "lr_scheduler")


def pickled(path, mark):
    import torch

    torch.save(Hostile(mark), path)


def old_tar(path, mark):
    """What torch wrote before 0.1.10: unpacked to the disk before anything is checked."""
    import io
    import tarfile

    with tarfile.open(path, "w:") as tar:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(Hostile(mark))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def old_pickle(path, mark):
    import torch

    torch.save(Hostile(mark), path, _use_new_zipfile_serialization=False)


def script(path, mark):
    """TorchScript, which torch 2.5 hands to torch.jit.load even with weights_only."""
    import torch

    torch.jit.script(torch.nn.Linear(1, 1)).save(str(path))


def reset(root, clean):
    import shutil

    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(clean, root)


def what_came_of(call, mark):
    """Empty if the call was refused with one typed line, and nothing was executed."""
    from elastic_ckpt.errors import ElasticCkptError

    try:
        call()
    except ElasticCkptError as error:
        outcome = "two lines" if len(str(error).splitlines()) > 1 else ""
    except Exception as error:
        outcome = f"{type(error).__name__}, not typed: {error}"
    else:
        outcome = "loaded"
    return "executed" if mark.exists() else outcome


def try_bombs(directory, root, clean, mark):
    """Every kind of bomb in every place, unsealed, with a wrong hash, and sealed again."""
    from elastic_ckpt import load_checkpoint

    outcomes = {}
    for pattern in BOMBS:
        for bomb in (pickled, old_tar, old_pickle, script):
            for seal in ("none", "wrong", "right"):
                for place in (root, directory) if bomb is pickled else (root,):
                    reset(root, clean)
                    files = [p for p in sorted(root.glob(pattern)) if p.suffix in (".bin", "")]
                    bomb(files[0], mark)
                    if seal == "none":
                        (root / "manifest.json").unlink()
                    elif seal == "right":
                        seal_again(root)
                    outcomes[f"{files[0].name} {bomb.__name__} {seal} {place}"] = what_came_of(
                        lambda place=place: load_checkpoint(place, *boosted()), mark
                    )
    return outcomes


def resume_bomb(directory, root, clean, mark):
    """A Session over a checkpoint that an attacker sealed."""
    from elastic_ckpt import Session

    def resume():
        booster, model, optimizer, scheduler = boosted()
        things = {"model": model, "optimizer": optimizer, "lr_scheduler": scheduler}
        with Session(directory, booster=booster, **things):
            pass

    reset(root, clean)
    pickled(next(root.glob("optimizer/*-0*.bin")), mark)
    seal_again(root)
    return what_came_of(resume, mark)


def index_outside(root, clean):
    """An index that names a file of another place; the file itself is a valid one."""
    import shutil

    from elastic_ckpt import load_checkpoint

    outcomes = []
    for part in ("modeling", "optimizer"):
        reset(root, clean)
        load_checkpoint(root, *boosted())
        index = next((root / part).glob("*.index.json"))
        content = json.loads(index.read_text())
        [name] = set(content["weight_map"].values())
        shutil.copy(root / part / name, root.parents[1] / name)
        content["weight_map"] = dict.fromkeys(content["weight_map"], f"../../../{name}")
        index.write_text(json.dumps(content))
        seal_again(root)
        try:
            load_checkpoint(root, *boosted())
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")
    return outcomes


def forced_back(root, clean):
    """What ColossalAI's own calls of torch.load ask for, and what they get."""
    import torch

    from elastic_ckpt import load_checkpoint

    reset(root, clean)
    plain, seen = torch.load, []

    def record(f, *args, **options):
        seen.append(options.get("weights_only"))
        return plain(f, *args, **options)

    torch.load = record
    try:
        load_checkpoint(root, *boosted())
        return seen, torch.load is record
    finally:
        torch.load = plain


def hostile_loads(rank, directory):
    import shutil
    from pathlib import Path

    save_ours(directory)
    root, clean = Path(directory) / "epoch-0_step-3", Path(directory).parent / "clean"
    shutil.copytree(root, clean)
    mark = Path(directory).parent / "executed"
    return {
        "bombs": try_bombs(directory, root, clean, mark),
        "session": resume_bomb(directory, root, clean, mark),
        "indexes": index_outside(root, clean),
        "calls": forced_back(root, clean),
    }


def test_sealed_bombs_are_rejected(tmp_path):
    """In one process, because importing ColossalAI takes longer than all of it."""
    [found] = run_ranks(hostile_loads, 1, str(tmp_path / "job"), seconds=200)
    assert len(found["bombs"]) == len(BOMBS) * (4 * 3 + 3)
    assert {case: outcome for case, outcome in found["bombs"].items() if outcome} == {}
    assert found["session"] == ""
    assert len(found["indexes"]) == 2
    assert all("unsafe path" in outcome for outcome in found["indexes"])
    calls, put_back = found["calls"]
    assert len(calls) >= 4 and all(calls) and put_back


@pytest.mark.parametrize("ranks", [1, slow(3)])
def test_other_world_sizes_resume_from_it(tmp_path, ranks):
    assert run_ranks(save_for_others, 2, str(tmp_path)) == [None, None]
    place = (0, 3, 12 // ranks)  # samples of each rank
    assert run_ranks(load_from_others, ranks, str(tmp_path)) == [(place, True)] * ranks


def test_plain_colossalai_reads_it(tmp_path):
    assert run_ranks(read_by_plain_colossalai, 2, str(tmp_path)) == [True, True]
    names = {path.name for path in (tmp_path / "epoch-0_step-3").iterdir()}
    assert {"modeling", "optimizer", "lr_scheduler", "running_states.json"} <= names
    running = json.loads((tmp_path / "epoch-0_step-3" / "running_states.json").read_text())
    assert running == {"epoch": 0, "step": 3, "sample_start_index": 6}


def test_cpu_accelerator_still_needs_the_shim():
    assert run_ranks(needs_mending, 1) == [True]


@pytest.mark.parametrize("part", [slow("modeling/*.bin"), "optimizer/*.bin", slow("lr_scheduler")])
def test_only_weights_are_unpickled(tmp_path, part):
    # The trap itself works: a plain unpickling springs it.
    pickle.loads(pickle.dumps(Hostile(str(tmp_path / "sprung"))))
    assert (tmp_path / "sprung").is_dir()
    for outcome, executed in run_ranks(load_hostile, 2, str(tmp_path / "job"), part):
        assert outcome != "loaded"
        assert not executed, outcome

"""The torch engine on real ranks: every tensor once, and read back into any other spread."""

from __future__ import annotations

import json
import pickle
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import distributed, nn

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.position import Position
from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.training.runtime import join
from elastic_ckpt.training.state.save import write_checkpoint
from elastic_ckpt.training.state.snapshot import Snapshot
from tests.integration.ranks import run_ranks
from tests.integration.torch_trainers import Trainer, bits, differences, differing, save

dist: Any = distributed

STEPS = 3
PARTS = ("modeling", "optimizer")


# -- what ranks do ------------------------------------------------------------------------------


def save_and_go_on(rank: int, directory: str, kinds: list[str]) -> None:
    for kind in kinds:
        trainer = Trainer(kind).train(0, STEPS)
        with torch.no_grad():
            trainer.model.get_buffer("module.seen" if kind == "ddp" else "seen").add_(rank)
        place = Path(directory, kind)
        save(trainer, place, rank)
        trainer.train(STEPS, STEPS + 2)
        save(trainer, Path(directory, f"{kind}-later"), rank)


def load_and_go_on(rank: int, directory: str, saved: list[str], kinds: list[str]) -> list[str]:
    """What differs after a load, and at the world size and in the spread of the save, later."""
    found = []
    for name in saved:
        place = Path(directory, name)
        for kind in kinds:
            trainer = Trainer(kind, seed=9)
            if name == "fsdp":
                trainer.train(0, 1)  # so that the optimizer has memory of its own already
            trainer.engine.load(place)
            found += [f"{name} into {kind}: {one}" for one in differences(trainer, place)]
            trainer.train(STEPS, STEPS + 2)
            if name == kind:
                later = differences(trainer, Path(directory, f"{name}-later"))
                found += [f"{name} later: {one}" for one in later]
    return found


def save_while_everything_changes(rank: int, directory: str, tier: str) -> list[str]:
    """What a save holds although its tensors are overwritten as soon as it returns."""
    runtime = join(directory)
    place = Path(directory, "epoch-0_step-3")
    if tier:
        runtime.memory = MemoryTier(Path(tier))
    trainer = Trainer("ddp").train(0, STEPS)
    expected = trainer.gathered()
    snapshot = Snapshot("interval", Position(epoch=0, step=STEPS, step_in_epoch=STEPS), {})
    write_checkpoint(runtime, trainer.engine, snapshot)
    with torch.no_grad():
        for tensor in (*trainer.model.parameters(), *trainer.model.buffers()):
            tensor.fill_(-1)
        for held in trainer.optimizer.state.values():
            for tensor in held.values():
                tensor.fill_(-1)
    if tier:
        [newest, *_] = MemoryTier(Path(tier)).sealed()
        assert not place.exists()
        place = newest.generation.path
    other = Trainer("ddp", seed=9)
    other.engine.load(place)
    return differing(other.gathered(), expected)


def save_while_the_structure_changes(rank: int, directory: str) -> list[str]:
    """First before the optimizer has stepped, then after it, then with a layer more."""
    trainer = Trainer("ddp")
    places = [Path(directory, name) for name in ("fresh", "stepped", "wider")]
    save(trainer, places[0], rank)
    save(trainer.train(0, 1), places[1], rank)
    trainer.model.module.register_module("added", nn.Linear(5, 5))
    save(trainer, places[2], rank)
    found = []
    for place in places:
        other = Trainer("ddp", seed=9)
        if place.name == "wider":
            other.model.module.register_module("added", nn.Linear(5, 5))
        dist.barrier()
        other.engine.load(place)
        found += [f"{place.name}: {one}" for one in differences(other, place)]
    return found


def fail_on_rank_1(rank: int, directory: str, how: str) -> list[Any]:
    """One rank's state cannot be saved or differs from the others'; then it is repaired."""
    from elastic_ckpt import save_checkpoint

    trainer = Trainer("ddp")
    model, added = trainer.model, trainer.model.module.layers[0].bias
    before = added.data
    if rank == 1 and how == "a buffer that has no memory":
        model.module.register_buffer("odd", torch.ones(1, device="meta"))
    if rank == 1 and how == "another shape":
        added.data = torch.zeros(3)
    error_found: list[Any] = []
    try:
        save_checkpoint(directory, None, model, trainer.optimizer, None, 0, 1, 4, None)
    except Exception as error:
        error_found = [type(error).__name__, str(error)]
    added.data = before
    model.module._buffers.pop("odd", None)
    save_checkpoint(directory, None, model, trainer.optimizer, None, 0, 2, 4, None)
    return error_found


def load_what_does_not_fit(rank: int, directory: str, damage: str) -> None:
    trainer = Trainer("fsdp" if damage == "index" else "ddp", seed=9)
    if damage == "model":
        trainer.model.module.layers[2] = nn.Linear(33, 34)
    trainer.engine.load(Path(directory))


def step_for_real(rank: int, directory: str, load: bool) -> dict[str, str]:
    """Four steps of DDP's own, with a save (or its load) in the middle; digests at the end."""
    trainer, place = Trainer("ddp", seed=9 if load else 1), Path(directory, "half")

    def steps(first: int, last: int) -> None:
        for step in range(first, last):
            words = (torch.arange(6) * (rank + 1) + step) % 7
            loss = nn.functional.cross_entropy(trainer.model(words), (words + 1) % 7)
            trainer.optimizer.zero_grad()
            loss.backward()
            trainer.optimizer.step()

    if load:
        trainer.engine.load(place)
    else:
        steps(0, 2)
        place.mkdir(exist_ok=True)
        trainer.engine.save(place, DiskPart(place, "tested", rank))
    steps(2, 4)
    return {
        name: sha256(bits(tensor)[2]).hexdigest() for name, tensor in trainer.gathered().items()
    }


# -- what a checkpoint holds --------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that two ranks wrote, by kind."""
    directory = tmp_path_factory.mktemp("saved")
    assert run_ranks(save_and_go_on, 2, str(directory), ["ddp", "fsdp"]) == [None, None]
    return directory


def index_of(part: Path) -> dict[str, Any]:
    tensors: dict[str, Any] = json.loads((part / "index.json").read_text())["tensors"]
    return tensors


def test_each_tensor_is_written_once_by_one_of_the_ranks(saved: Path) -> None:
    sizes = [0, 0]
    for part in PARTS:
        names = []
        for rank in range(2):
            path = saved / "ddp" / part / f"{rank:05d}.safetensors"
            sizes[rank] += path.stat().st_size
            names += list(load_file(path))
        assert sorted(names) == sorted(index_of(saved / "ddp" / part))
    assert max(sizes) < 1.4 * min(sizes)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_safetensors_and_the_index_restore_every_tensor(saved: Path, kind: str) -> None:
    expected = load_file(saved / kind / "expected")
    found = {}
    for part in PARTS:
        for name, entry in index_of(saved / kind / part).items():
            gathered = torch.full(entry["shape"], 77, dtype=torch.float32)
            for shard in entry["shards"]:
                with safe_open(saved / kind / part / shard["file"], "pt") as file:
                    box = zip(shard["offsets"], shard["sizes"], strict=True)
                    where = tuple(slice(begin, begin + size) for begin, size in box)
                    gathered[where] = file.get_tensor(shard["name"])
            found[name.removeprefix("state.")] = gathered
    del expected["head.weight"]  # tied to the embedding
    expected = {name: one for name, one in expected.items() if not name.startswith("head.weight.")}
    assert differing(found, expected) == []


def test_shard_records_its_position(saved: Path) -> None:
    """Which makes the files self-describing."""
    shards = index_of(saved / "fsdp" / "modeling")["embedding.weight"]["shards"]
    assert [(one["name"], one["sizes"]) for one in shards] == [
        ("embedding.weight@0,0", [4, 33]),
        ("embedding.weight@4,0", [3, 33]),
    ]


def test_nothing_is_pickled(saved: Path) -> None:
    files = [path for path in (saved / "fsdp").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        data = path.read_bytes()
        assert path.suffix in (".json", ".safetensors", ""), path
        assert data[:1] != b"\x80" and b"PK\x03\x04" not in data and b"\nOrderedDict" not in data


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_nothing_is_unpickled(saved: Path) -> None:
    trainer = Trainer("plain", seed=9)
    forbidden = mock.Mock(side_effect=AssertionError("something was unpickled"))
    with (
        mock.patch.object(pickle, "Unpickler", forbidden),
        mock.patch.object(pickle, "load", forbidden),
        mock.patch.object(pickle, "loads", forbidden),
        mock.patch.object(torch, "load", forbidden),
    ):
        trainer.engine.load(saved / "fsdp")
    assert differences(trainer, saved / "fsdp") == []


# -- what is read back --------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_checkpoint_of_two_ranks_loads_at_any_world_size(saved: Path, world_size: int) -> None:
    arguments = str(saved), ["ddp", "fsdp"], ["plain", "ddp", "fsdp"]
    found = run_ranks(load_and_go_on, world_size, *arguments)
    if world_size != 2:  # elementwise steps over shards of other lengths may round otherwise
        found = [[line for line in lines if " later: " not in line] for lines in found]
    assert found == [[]] * world_size


def test_checkpoint_of_four_ranks_loads_on_two(tmp_path: Path) -> None:
    """More ranks than some tensors have rows."""
    assert run_ranks(save_and_go_on, 4, str(tmp_path), ["fsdp"]) == [None] * 4
    found = run_ranks(load_and_go_on, 2, str(tmp_path), ["fsdp"], ["fsdp"])
    assert [[line for line in lines if " later: " not in line] for lines in found] == [[], []]


def test_ddp_resume_is_exact(tmp_path: Path) -> None:
    calm = run_ranks(step_for_real, 2, str(tmp_path), False)
    assert len(calm[0]) > 20
    assert run_ranks(step_for_real, 2, str(tmp_path), True) == calm


# -- what happens around a save -----------------------------------------------------------------


@pytest.mark.parametrize("tier", ["disk", "memory"])
def test_changes_after_a_save_are_not_in_it(tmp_path: Path, tier: str) -> None:
    memory = tmp_path / "tier"
    memory.mkdir()
    given = str(memory) if tier == "memory" else ""
    results = run_ranks(save_while_everything_changes, 2, str(tmp_path / "job"), given)
    assert results == [[], []]


def test_changed_structure_is_planned_again(tmp_path: Path) -> None:
    assert run_ranks(save_while_the_structure_changes, 2, str(tmp_path)) == [[], []]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a buffer that has no memory", "rank 1 could not save: the state at 'odd' is a Tensor"),
        ("another shape", "rank 1 could not save: its modeling/layers.0.bias has another shape"),
    ],
)
def test_failing_rank_is_an_error_on_all_and_the_next_save_succeeds(
    tmp_path: Path, how: str, reason: str
) -> None:
    results = run_ranks(fail_on_rank_1, 2, str(tmp_path), how)
    assert [name for name, _ in results] == ["SaveFailed"] * 2
    assert all(reason in text for _, text in results)
    assert [path.name for path in tmp_path.glob("epoch-*")] == ["epoch-0_step-2"]


# -- what does not fit --------------------------------------------------------------------------


def test_model_of_another_shape_is_an_error_on_every_rank(saved: Path) -> None:
    for name, text in run_ranks(load_what_does_not_fit, 2, str(saved / "ddp"), "model"):
        assert name == "CheckpointError"
        assert "layers.2.bias has the shape [34] instead of [33]" in text or (
            "layers.2.weight has the shape [34, 33] instead of [33, 33]" in text
        )


@pytest.mark.parametrize(
    "shard",
    [
        {"file": "00007.safetensors"},
        {"name": "gain"},
        {"sizes": [6, 33]},
        {"file": "../modeling/00000.safetensors"},
    ],
    ids=["a file that is not there", "another tensor", "an overlap", "a path"],
)
def test_index_that_does_not_match_the_files_is_an_error(
    saved: Path, tmp_path: Path, shard: dict[str, Any]
) -> None:
    place = Path(shutil.copytree(saved / "fsdp", tmp_path / "copy"))
    path = place / "modeling" / "index.json"
    index = json.loads(path.read_text())
    index["tensors"]["embedding.weight"]["shards"][0].update(shard)
    path.write_text(json.dumps(index))
    trainer = Trainer("plain")
    before = trainer.gathered()
    with pytest.raises((CheckpointRejected, FileNotFoundError)):
        trainer.engine.load(place)
    assert differing(trainer.gathered(), before) == []


def test_mismatched_index_is_an_error_on_every_rank(saved: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(saved / "fsdp", tmp_path / "copy"))
    path = place / "optimizer" / "index.json"
    index = json.loads(path.read_text())
    del index["tensors"]["state.gain.exp_avg"]["shards"][:]
    path.write_text(json.dumps(index))
    for name, text in run_ranks(load_what_does_not_fit, 2, str(place), "index"):
        assert name == "CheckpointRejected"
        assert "state.gain.exp_avg: its shards do not cover it exactly once" in text

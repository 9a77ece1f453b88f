"""A checkpoint of plain ColossalAI is sealed if, and only if, it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from elastic_ckpt.checkpoint.adopt import adopt
from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.verify import verify_full
from elastic_ckpt.errors import CheckpointRejected, UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.util.progress import unwatched
from tests.checkpoints import open_job

MODEL = "modeling/pytorch_model-00001.bin"
OPTIMIZER = "optimizer/pytorch_optim-00001.bin"


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    return open_job(tmp_path / "job")


@pytest.fixture
def foreign(job: JobDirectory) -> Path:
    """As ColossalAI lays it out; four ranks' script wrote it."""
    path = job.checkpoint(1, 40)
    for part in ("modeling", "optimizer"):
        (path / part).mkdir(parents=True)
    torch.save({"weight": torch.arange(2000.0)}, path / MODEL)
    torch.save({0: {"exp_avg": torch.ones(2000)}}, path / OPTIMIZER)
    torch.save([{"lr": 0.1}], path / "optimizer/pytorch_optim_group.bin")
    torch.save({"last_epoch": 40}, path / "lr_scheduler")
    write_json(
        path / "modeling/pytorch_model.bin.index.json",
        {"metadata": {"total_size": 1}, "weight_map": {"weight": Path(MODEL).name}},
    )
    write_json(
        path / "optimizer/pytorch_optim.bin.index.json",
        {
            "metadata": {"param_groups": "pytorch_optim_group.bin", "total_size": 1},
            "weight_map": {"0": Path(OPTIMIZER).name},
        },
    )
    write_json(path / "running_states.json", {"epoch": 1, "step": 40, "sample_start_index": 160})
    return path


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def test_a_whole_one_is_sealed_with_the_place_of_all_ranks(
    job: JobDirectory, foreign: Path
) -> None:
    before = {path: path.read_bytes() for path in foreign.rglob("*") if path.is_file()}
    made = adopt(job, foreign, 4, unwatched)
    assert (made.epoch, made.step, made.sample_start_index) == (1, 40, 640)
    assert (made.engine.name, made.data_parallel_size) == ("colossalai", 4)
    assert verify_full(foreign) == made
    assert {path: path.read_bytes() for path in before} == before
    newest = newest_intact(job)
    assert newest is not None and newest.path == foreign


def test_what_a_killed_adoption_left_does_not_stop_the_next_one(
    job: JobDirectory, foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(
            "elastic_ckpt.checkpoint.adopt.sync_tree",
            lambda _: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        adopt(job, foreign, 4, unwatched)
    assert (foreign / "parts/00000.json").exists() and newest_intact(job) is None
    for half_written in (".tmp-manifest.json", "parts/.tmp-00000.json"):
        (foreign / half_written).write_text("{")
    adopt(job, foreign, 4, unwatched)
    verify_full(foreign)


def test_a_place_that_counts_for_each_rank_needs_their_number(
    job: JobDirectory, foreign: Path
) -> None:
    with pytest.raises(UsageError, match=r"sample_start_index 160 .* --data-parallel-size"):
        adopt(job, foreign, None, unwatched)
    rewrite(foreign / "running_states.json", lambda states: states.update(sample_start_index=0))
    assert adopt(job, foreign, None, unwatched).sample_start_index == 0


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def without_weights(index: dict) -> None:
    del index["weight_map"]


def leads_out(index: dict) -> None:
    index["weight_map"]["weight"] = "../../secret.bin"


def names_a_number(index: dict) -> None:
    index["weight_map"]["weight"] = 7


def save_old_pickle(path: Path) -> None:
    torch.save({}, path, _use_new_zipfile_serialization=False)


def add_link(path: Path) -> None:
    (path / "modeling/extra").symlink_to("/etc/hostname")


def add_hard_link(path: Path) -> None:
    os.link(path / MODEL, path.parent / "other")


INDEX = "modeling/pytorch_model.bin.index.json"

DAMAGE: list[tuple[str, Callable[[Path], object], str]] = [
    ("a shard is gone", lambda p: (p / MODEL).unlink(), f"{MODEL} is missing"),
    ("a byte differs", lambda p: flip(p / MODEL), f"{MODEL} is damaged"),
    ("a shard is cut", lambda p: cut(p / OPTIMIZER), f"{OPTIMIZER} is damaged"),
    ("a shard is empty", lambda p: os.truncate(p / MODEL, 0), "no archive of tensors"),
    ("a pickle of old", lambda p: save_old_pickle(p / MODEL), "no archive of tensors"),
    ("the scheduler is cut", lambda p: cut(p / "lr_scheduler"), "lr_scheduler is damaged"),
    (
        "the groups are gone",
        lambda p: (p / "optimizer/pytorch_optim_group.bin").unlink(),
        "pytorch_optim_group.bin is missing",
    ),
    ("no index", lambda p: (p / INDEX).unlink(), "modeling/ has no index"),
    ("no model", lambda p: shutil.rmtree(p / "modeling"), "modeling/ has no index"),
    ("half an index", lambda p: cut(p / INDEX), "index.json is not readable"),
    (
        "an index without weights",
        lambda p: rewrite(p / INDEX, without_weights),
        "speaks of no file",
    ),
    ("an index of numbers", lambda p: rewrite(p / INDEX, names_a_number), "not readable"),
    ("an index that leads out", lambda p: rewrite(p / INDEX, leads_out), "secret"),
    ("no place", lambda p: (p / "running_states.json").unlink(), "running_states.json is missing"),
    (
        "another save's place",
        lambda p: rewrite(p / "running_states.json", lambda states: states.update(step=20)),
        "the name says otherwise",
    ),
    (
        "an interrupted save",
        lambda p: ((p / "modeling/tmp_index_files").mkdir(), cut_into(p)),
        "its save was interrupted",
    ),
    ("a link", add_link, "extra"),
    ("parts that lie elsewhere", lambda p: lead_parts_away(p), "parts"),
    ("a second name", add_hard_link, "another name"),
]


def lead_parts_away(path: Path) -> None:
    (path.parent / "away").mkdir()
    (path / "parts").symlink_to(path.parent / "away")


def cut_into(path: Path) -> None:
    (path / "modeling/tmp_index_files/0.json").write_text("{}")


@pytest.mark.parametrize(("damage", "reason"), [(do, why) for _, do, why in DAMAGE],
                         ids=[name for name, _, _ in DAMAGE])  # fmt: skip
def test_one_that_is_not_whole_is_refused_with_the_reason(
    job: JobDirectory, foreign: Path, damage: Callable[[Path], object], reason: str
) -> None:
    damage(foreign)
    with pytest.raises((CheckpointRejected, OSError), match=reason):
        adopt(job, foreign, 4, unwatched)
    assert not (foreign / "manifest.json").exists()
    assert newest_intact(job) is None

"""State that differs by rank: compared, written by each rank, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, ElasticCkptError
from elastic_ckpt.training.ranks.peers import Peers
from elastic_ckpt.training.state.candidate import Readable
from elastic_ckpt.training.state.holding import Holding, Names, unequal_names
from elastic_ckpt.training.state.module_values import module_values
from elastic_ckpt.training.state.rank_state import RankState
from elastic_ckpt.training.tensors.digest import digest_values
from elastic_ckpt.training.tensors.state_codec import write_state


class Net(nn.Module):
    """One buffer of each kind, one of which is not saved, and an extra state."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 1)
        self.register_buffer("same", torch.arange(5.0))
        self.register_buffer("own", torch.tensor([float("nan"), -0.0, 1e-45]) * (rank + 1))
        self.register_buffer("scratch", torch.full((2,), float(rank)), persistent=False)
        self.seen = [rank, "x"]

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Thing:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


def model_of(rank: int) -> nn.Module:
    model = Net(rank)
    model.norm(torch.full((4, 3), float(rank)) + torch.eye(4, 3))
    return model


def extra_of(rank: int) -> dict[str, Thing]:
    return {
        "equal": Thing({"a": torch.ones(4), "b": (1, None)}),
        "own": Thing([rank, torch.full((3,), float(rank))]),
    }


def unequal(holdings: list[Holding]) -> Names:
    digests = [one.digests() for one in holdings]
    return unequal_names((model for model, _ in digests), (extra for _, extra in digests))


def save(
    directory: Path, states: list[RankState], change: Callable[[dict[str, Any]], Any] = dict.copy
) -> Readable:
    """Write what each rank writes of its own; ``change`` makes each tree another one."""
    held = [one.hold() for one in states]
    found = unequal(held) if len(held) > 1 else frozenset()
    files = []
    directory.mkdir(exist_ok=True)
    for rank, state in enumerate(states):
        part = DiskPart(directory, "tested", rank)
        tree = state.capture(rank, held[rank], found, iterating=True)
        write_state(part, f"ranks/{rank:05d}", change(tree) or tree)
        files += [SimpleNamespace(path=path) for path in part.paths]
    seal: Any = SimpleNamespace(
        files=files, world_size=len(states), checkpoint_name="epoch-0_step-1"
    )
    return Readable(seal, None, directory)  # type: ignore[arg-type]


def states(ranks: int) -> list[RankState]:
    return [RankState(dict(extra_of(rank)), model_of(rank)) for rank in range(ranks)]


def resume(loaded: Readable, rank: int, ranks: int) -> tuple[RankState, str]:
    found = RankState({"equal": Thing(None), "own": Thing(None)}, Net(7))
    return found, found.resume(loaded, Peers(rank, ranks, None, 1.0))


def bits(state: RankState) -> dict[str, bytes]:
    return {
        name: value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        for name, value in module_values(state.model).items()
    }


def test_what_differs_is_found_by_name() -> None:
    written = [one.hold() for one in states(3)]
    first, second = (one.to_write(rank, unequal(written)) for rank, one in enumerate(written[:2]))
    assert set(first["model"]) == set(second["model"]) == {
        "own", "norm.running_mean", "_extra_state",
    }  # fmt: skip
    assert first["shared"] == second["shared"] == ["equal"]
    assert set(first["extra"]) == {"equal", "own"} and set(second["extra"]) == {"own"}


def test_each_rank_has_its_own_values_back_to_the_bit(tmp_path: Path) -> None:
    before = states(2)
    loaded = save(tmp_path, before)
    for rank, state in enumerate(before):
        found, lost = resume(loaded, rank, 2)
        wanted, got = bits(state), bits(found)
        # what is equal comes from the engine
        for name in ("own", "norm.running_mean", "_extra_state"):
            assert got[name] == wanted[name], name
        assert found.extra["own"].value[0] == rank
        assert torch.equal(found.extra["own"].value[1], torch.full((3,), float(rank)))
        assert torch.equal(found.extra["equal"].value["a"], torch.ones(4))
        assert lost == ""


def test_equal_state_is_written_once(tmp_path: Path) -> None:
    big = torch.zeros(10_000)
    save(tmp_path, [RankState({"ema": Thing(big)}, nn.BatchNorm1d(5000)) for _ in range(3)])
    sizes = [(tmp_path / f"ranks/0000{rank}.safetensors").stat().st_size for rank in range(3)]
    alone = RankState({})
    save(tmp_path / "alone", [alone])
    least = (tmp_path / "alone/ranks/00000.safetensors").stat().st_size
    assert sizes[1] == sizes[2] == least
    assert big.nbytes <= sizes[0] - least < big.nbytes + 200


@pytest.mark.parametrize("ranks, rank, other", [(1, 0, 0), (3, 2, 0), (3, 1, 1)])
def test_another_number_of_ranks_is_said_with_what_each_gets(
    tmp_path: Path, ranks: int, rank: int, other: int
) -> None:
    loaded = save(tmp_path, states(2))
    found, lost = resume(loaded, rank, ranks)
    assert found.extra["own"].value[0] == other
    assert "of 3 buffers every rank has rank 0's" in lost
    assert "of 1 extra object rank N has that of rank N % 2" in lost
    assert found.model.own.tolist()[1:] == Net(7).own.tolist()[1:]  # as the engine left it


def test_one_rank_alone_has_nothing_that_differs(tmp_path: Path) -> None:
    loaded = save(tmp_path, states(1))
    for rank in (0, 1):
        found, lost = resume(loaded, rank, 2)
        assert lost == "" and found.extra["own"].value[0] == 0


def test_a_checkpoint_of_the_earlier_form_loads(tmp_path: Path) -> None:
    """Each rank wrote all of its extra objects then, and nothing of the model."""
    before = states(2)
    trees = [{name: one.state_dict() for name, one in state.extra.items()} for state in before]

    def earlier(tree: dict[str, Any]) -> None:
        for new in ("model", "shared"):
            tree.pop(new)
        tree["extra"] = trees[1] if "equal" not in tree["extra"] else trees[0]

    loaded = save(tmp_path, before, earlier)
    found, lost = resume(loaded, 1, 2)
    assert found.extra["own"].value[0] == 1 and lost == ""
    assert torch.equal(found.extra["equal"].value["a"], torch.ones(4))
    assert resume(loaded, 0, 1)[1] == ""


def test_an_object_that_was_not_saved_is_named(tmp_path: Path) -> None:
    loaded = save(tmp_path, states(2))
    new = RankState({"new": Thing(None)}, Net())
    with pytest.raises(ElasticCkptError, match="no state for extra='new'"):
        new.resume(loaded, Peers(1, 2, None, 1.0))


def test_an_object_of_one_rank_alone_is_its_own(tmp_path: Path) -> None:
    before = [RankState({}), RankState({"log": Thing("mine")})]
    loaded = save(tmp_path, before)
    after = RankState({"log": Thing(None)})
    assert after.resume(loaded, Peers(1, 2, None, 1.0)) == ""
    assert after.extra["log"].value == "mine"


def test_a_buffer_of_one_stage_alone_is_the_engines() -> None:
    """With a pipeline each rank has the buffers of its stage."""
    stages = [Holding(nn.BatchNorm1d(3), {}), Holding(nn.Sequential(nn.BatchNorm1d(3)), {})]
    assert unequal(stages) == frozenset()


def test_what_cannot_be_compared_is_everyones_own() -> None:
    class Raises(Thing):
        def state_dict(self) -> Any:
            raise ValueError("no state today")

    held = [Holding(Net(), {"odd": Thing(object())}) for _ in range(2)]
    assert "odd" in held[1].to_write(1, unequal(held))["extra"]
    failed = Holding(Net(), {"odd": Raises(1)})
    assert failed.digests() == (b"", b"")
    with pytest.raises(ValueError, match="no state today"):
        failed.to_write(0, frozenset())


def test_what_our_files_cannot_hold_is_left_to_the_engine() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    model.register_buffer("nowhere", torch.ones(1, device="meta"))
    model.register_buffer("none", None)
    assert module_values(model) == {}
    assert module_values(object()) == {}


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tree: tree.update(model=[1]), "not a rank's state"),
        (lambda tree: tree.update(shared="equal"), "not a rank's state"),
        (lambda tree: tree.update(shared=[["equal"]]), "not a rank's state"),
        (lambda tree: tree.pop("model") and None, "not a rank's state"),
        (lambda tree: tree["model"].update(own=5), "own is not a tensor"),
        (lambda tree: tree["model"].update(own=torch.ones(99)), r"own has the shape \[99\]"),
        (lambda tree: tree["model"].update(other=torch.ones(1)), "other has the shape"),
        (lambda tree: tree["model"].update({"linear.weight": torch.ones(1, 3)}), "linear.weight"),
    ],
)
def test_a_hostile_rank_local_file_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    """Under a valid seal, too: nothing but buffers is written to, and only in their own shape."""
    loaded = save(tmp_path, states(2), change)
    with pytest.raises((CheckpointRejected, CheckpointError), match=message):
        resume(loaded, 1, 2)


@pytest.mark.parametrize(
    "one, other",
    [
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2)),
        (torch.zeros(0), torch.zeros(0, 1)),
        (np.ones(3), [1.0, 1.0, 1.0]),
        ({"a": torch.ones(1), "b": torch.zeros(1)}, {"b": torch.ones(1), "a": torch.zeros(1)}),
        (1, 1.0),
        ([1], (1,)),
    ],
)
def test_a_digest_tells_bits_and_types_apart(one: Any, other: Any) -> None:
    assert digest_values({"x": one}) == digest_values({"x": one})
    assert digest_values({"x": one}) != digest_values({"x": other})


def test_a_digest_ignores_the_layout() -> None:
    value = torch.arange(12.0).reshape(3, 4)
    assert digest_values({"x": value}) == digest_values({"x": value.t().contiguous().t()})

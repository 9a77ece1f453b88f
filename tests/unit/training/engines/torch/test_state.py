"""What is saved of a module and of its optimizer, and that it comes back into another pair."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.errors import CheckpointError, CheckpointRejected, UsageError
from elastic_ckpt.training.engines.torch.engine import TorchEngine
from elastic_ckpt.training.engines.torch.state import module_state, optimizer_state


class Tied(nn.Module):
    """Tied weights, a buffer, one that is not saved, extra state, odd shapes and names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.register_parameter("$", nn.Parameter(torch.rand(2)))
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.extra = {"seen": torch.rand(20_000), "names": ("a", b"b")}

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embedding(words))) * self.scale
        return out + self.get_parameter("$").sum() + self.nothing.sum()

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.5}]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adamw": lambda model: torch.optim.AdamW(groups(model), lr=0.01, amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(groups(model), lr=0.01, momentum=0.9),
    "sgd without state": lambda model: torch.optim.SGD(groups(model), lr=0.01),
    "adafactor": lambda model: torch.optim.Adafactor(  # it divides by the number of elements
        [parameter for parameter in model.parameters() if parameter.numel()], lr=0.01
    ),
    "rprop": lambda model: torch.optim.Rprop(groups(model), lr=0.01),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=2),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for number in range(first, first + steps):
        words = torch.arange(4) + number % 3

        def closure(words: torch.Tensor = words) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(words).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


def trainer(kind: str, seed: int, steps: int = 0) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = OPTIMIZERS[kind](model)
    train(model, optimizer, steps)
    return model, optimizer


def save(directory: Path, model: Any, optimizer: Any = None) -> Path:
    TorchEngine(model, optimizer, None).save(directory, DiskPart(directory, "tested", 0))
    return directory


def plain(value: Any) -> Any:
    """A state to compare: tensors by dtype, shape and bits."""
    if isinstance(value, torch.Tensor):
        held = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), list(value.shape), held.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 2], ids=["fresh", "that has stepped"])
def test_a_restored_trainer_continues_identically(tmp_path: Path, kind: str, before: int) -> None:
    first = trainer(kind, 1, 3)
    save(tmp_path, *first)
    second = trainer(kind, 2, before)
    TorchEngine(*second, None).load(tmp_path)
    for one, other in zip(first, second, strict=True):
        assert plain(one.state_dict()) == plain(other.state_dict())
    for pair in (first, second):
        train(*pair, steps=2, first=3)
    for one, other in zip(first, second, strict=True):
        assert plain(one.state_dict()) == plain(other.state_dict())


def test_tied_weights_are_written_once_and_restored_in_place(tmp_path: Path) -> None:
    model, optimizer = trainer("adamw", 1, 2)
    save(tmp_path, model, optimizer)
    assert "head.weight" not in load_file(tmp_path / "modeling" / "00000.safetensors")
    other, its_optimizer = trainer("adamw", 2, 2)
    where = other.head.weight.data_ptr()
    moment = its_optimizer.state[other.head.weight]["exp_avg"].data_ptr()
    TorchEngine(other, its_optimizer, None).load(tmp_path)
    assert other.head.weight is other.embedding.weight
    assert other.head.weight.data_ptr() == where
    assert its_optimizer.state[other.head.weight]["exp_avg"].data_ptr() == moment


def test_tied_weights_can_be_loaded_into_untied_ones(tmp_path: Path) -> None:
    model, _ = trainer("sgd", 1)
    save(tmp_path, model)
    other = Tied()
    other.head.weight = nn.Parameter(torch.zeros(7, 3))
    TorchEngine(other, None, None).load(tmp_path)
    assert torch.equal(other.head.weight, model.head.weight)
    assert torch.equal(other.embedding.weight, model.embedding.weight)


def test_buffers_are_saved_if_they_are_persistent() -> None:
    state = module_state(trainer("sgd", 1)[0])
    assert "norm.running_mean" in state.tensors
    assert "scratch" not in state.tensors and "scratch" not in state.tree


def test_the_state_shares_the_models_memory_and_no_rank_has_a_replica() -> None:
    model, optimizer = trainer("adamw", 1, 1)
    state = module_state(model)
    assert state.tensors["embedding.weight"] is model.embedding.weight
    assert not state.alike  # no DDP keeps the ranks equal
    moments = optimizer_state(model, optimizer)
    assert moments is not None
    held = optimizer.state[model.scale]["exp_avg"]
    assert moments.tensors["state.scale.exp_avg"].data_ptr() == held.data_ptr()


def test_an_optimizer_that_has_not_stepped_is_not_stepped(tmp_path: Path) -> None:
    model, optimizer = trainer("adamw", 1)
    before = plain(model.state_dict())
    save(tmp_path, model, optimizer)
    assert plain(model.state_dict()) == before
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    other, its_optimizer = trainer("adamw", 2, 3)
    TorchEngine(other, its_optimizer, None).load(tmp_path)
    assert its_optimizer.state_dict()["state"] == {}


def test_the_optimizers_state_uses_the_parameters_names(tmp_path: Path) -> None:
    """So its parameters may be numbered otherwise when it is read."""
    model, _ = trainer("sgd", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    train(model, optimizer, 2)
    save(tmp_path, model, optimizer)
    other = Tied()
    reversed_ = torch.optim.AdamW(list(other.parameters())[::-1], lr=9.0)
    TorchEngine(other, reversed_, None).load(tmp_path)
    assert reversed_.param_groups[0]["lr"] == 0.25
    for name, parameter in model.named_parameters():
        theirs = reversed_.state[other.get_parameter(name)]
        assert plain(theirs) == plain(optimizer.state[parameter])


def test_parameters_that_are_not_optimized_have_no_state(tmp_path: Path) -> None:
    model, _ = trainer("sgd", 1)
    model.scale.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    train(model, optimizer, 1)
    save(tmp_path, model, optimizer)
    other, _ = trainer("sgd", 2)
    its_optimizer = torch.optim.AdamW([p for p in other.parameters() if p is not other.scale])
    TorchEngine(other, its_optimizer, None).load(tmp_path)
    assert other.scale not in its_optimizer.state
    assert torch.equal(other.scale, model.scale)


# -- what is not torch's own --------------------------------------------------------------------


class Consolidating(torch.optim.SGD):
    """As ``ZeroRedundancyOptimizer``: its state is where it was brought together."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mine": torch.ones(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert torch.equal(state.pop("mine"), torch.ones(3))
        super().load_state_dict(state)


class Foreign:
    """No optimizer of torch's at all."""

    def __init__(self) -> None:
        self.state = {"moments": {"w": torch.rand(3)}, "step": 1}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_an_optimizer_with_its_own_state_dict_is_saved_by_it(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = Consolidating(model.parameters(), lr=0.5, momentum=0.1)
    assert optimizer_state(model, optimizer) is None
    save(tmp_path, model, optimizer)
    other = Consolidating(model.parameters(), lr=0.1)
    TorchEngine(model, other, None).load(tmp_path)
    assert other.param_groups[0]["lr"] == 0.5


def test_an_optimizer_of_foreign_parameters_is_saved_by_its_state_dict(tmp_path: Path) -> None:
    model, elsewhere = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([*model.parameters(), elsewhere], lr=0.5)
    assert optimizer_state(model, optimizer) is None
    save(tmp_path, model, optimizer)
    other = torch.optim.SGD([*model.parameters(), elsewhere], lr=0.1)
    TorchEngine(model, other, None).load(tmp_path)
    assert other.param_groups[0]["lr"] == 0.5


def test_any_object_with_a_state_dict_is_saved(tmp_path: Path) -> None:
    model, optimizer = Foreign(), Foreign()
    save(tmp_path, model, optimizer)
    others = Foreign(), Foreign()
    TorchEngine(*others, None).load(tmp_path)
    assert plain(others[0].state) == plain(model.state)
    assert plain(others[1].state) == plain(optimizer.state)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
    ids=["sparse", "meta", "complex128"],
)
def test_an_unsupported_tensor_is_rejected_by_name(
    tmp_path: Path, value: torch.Tensor, what: str
) -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    model[0].register_buffer("odd", value)
    with pytest.raises(UsageError, match=f"at '0.odd' is a Tensor.*{what}"):
        save(tmp_path, model)


# -- what does not fit ----------------------------------------------------------------------------


def test_a_shape_mismatch_names_the_tensor_and_both_shapes(tmp_path: Path) -> None:
    save(tmp_path, nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 3)))
    other = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 5))
    before = plain(other.state_dict())
    with pytest.raises(CheckpointError, match=r"1\.weight .* \[5, 2\] instead of \[3, 2\]"):
        TorchEngine(other, None, None).load(tmp_path)
    assert plain(other.state_dict()) == before


@pytest.mark.parametrize(
    ("saved", "now", "word"),
    [(1, 2, "Missing"), (2, 1, "Unexpected")],
    ids=["a layer more", "a layer less"],
)
def test_a_module_with_other_names_is_rejected_as_by_torch(
    tmp_path: Path, saved: int, now: int, word: str
) -> None:
    save(tmp_path, nn.Sequential(*[nn.Linear(2, 2) for _ in range(saved)]))
    with pytest.raises(RuntimeError, match=rf"{word} key\(s\) in state_dict: \"1.weight\""):
        TorchEngine(nn.Sequential(*[nn.Linear(2, 2) for _ in range(now)]), None, None).load(
            tmp_path
        )


def test_another_dtype_is_cast_as_by_torch(tmp_path: Path) -> None:
    model = nn.Linear(30, 20)
    save(tmp_path, model)
    other = nn.Linear(30, 20).to(torch.bfloat16)
    TorchEngine(other, None, None).load(tmp_path)
    assert other.weight.dtype == torch.bfloat16
    assert torch.equal(other.weight, model.weight.to(torch.bfloat16))


def test_an_optimizer_of_other_parameters_is_rejected(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    save(tmp_path, model, torch.optim.SGD(model.parameters(), lr=0.1))
    larger = nn.Sequential(*model, nn.Linear(2, 2))
    others = [
        (model, [model[0]], r"it lacks 1.weight, 1.bias; add .* resume_place\(\).epoch"),
        (model, [{"params": one.parameters()} for one in model], "the same parameters in another"),
        (larger, [larger], "the checkpoint lacks 2.weight, 2.bias;"),
    ]
    for module, trained, said in others:
        groups = [one if isinstance(one, dict) else {"params": one.parameters()} for one in trained]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        with pytest.raises(CheckpointError, match=said):
            TorchEngine(module, optimizer, None).load(tmp_path)


@pytest.mark.parametrize("inside", [False, True], ids=["the model", "a part of it"])
def test_flat_parameters_are_rejected(inside: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)  # its own needs an accelerator
    with pytest.raises(UsageError, match=r"use torch\.distributed\.fsdp\.fully_shard"):
        TorchEngine(nn.Sequential(flat) if inside else flat, None, None)


def test_a_plain_object_instead_of_a_module_is_rejected(tmp_path: Path) -> None:
    save(tmp_path, nn.Linear(1, 1))
    with pytest.raises(UsageError, match="is of a torch module"):
        TorchEngine(Foreign(), None, None).load(tmp_path)


# -- invalid files -------------------------------------------------------------------------------


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


HOSTILE: dict[str, Callable[[Any], Any]] = {
    "a list": lambda tree: [],
    "a number": lambda tree: 3,
    "no such tensor": lambda tree: tree | {"weight": {"$": "tensor", "name": "absent"}},
    "a tensor without a name": lambda tree: tree | {"weight": {"$": "tensor"}},
    "an unknown tag": lambda tree: tree | {"more": {"$": "code", "items": []}},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("part", ["modeling", "optimizer"])
def test_an_invalid_tree_is_rejected(tmp_path: Path, case: str, part: str) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save(tmp_path, model, optimizer)
    before = copy.deepcopy(model.state_dict())
    changed(tmp_path / part / "state.json", HOSTILE[case])
    with pytest.raises(CheckpointRejected, match=f"state in {part}"):
        TorchEngine(model, optimizer, None).load(tmp_path)
    assert plain(model.state_dict()) == plain(before)


@pytest.mark.parametrize("name", ["index.json", "00000.safetensors"])
def test_a_torn_file_is_rejected_before_anything_is_modified(tmp_path: Path, name: str) -> None:
    model, optimizer = trainer("adamw", 1, 1)
    save(tmp_path, model, optimizer)
    path = tmp_path / "optimizer" / name
    path.write_bytes(path.read_bytes()[:-3])
    other, its_optimizer = trainer("adamw", 2, 1)
    before = plain([other.state_dict(), its_optimizer.state_dict()])
    with pytest.raises(CheckpointRejected):
        TorchEngine(other, its_optimizer, None).load(tmp_path)
    assert plain([other.state_dict(), its_optimizer.state_dict()]) == before

"""A parameter has the name that torch's own checkpointing gives it, however it is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from elastic_ckpt.errors import UsageError
from elastic_ckpt.training.engines.torch.state import canonical_names

dist: Any = distributed


class Block(nn.Module):
    """Has an attribute that is called as DDP's is, and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


def model() -> nn.Sequential:
    return nn.Sequential(Block(), nn.ModuleDict({"module": Block(), "head": nn.Linear(2, 1)}))


def ddp(module: nn.Module) -> nn.Module:
    return DistributedDataParallel(module)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module)


def inner(wrap: Callable[[nn.Module], Any]) -> Callable[[nn.Module], nn.Module]:
    """Wrap a part of the model only."""

    def wrapped(module: Any) -> Any:
        module[1]["head"] = wrap(module[1]["head"])
        module[0] = wrap(module[0])
        return module

    return wrapped


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda module: module,
    "ddp": ddp,
    "compiled": compiled,
    "checkpointed": checkpoint_wrapper,
    "inside compiled": inner(compiled),
    "inside checkpointed": inner(checkpoint_wrapper),
    "ddp of compiled": lambda module: ddp(compiled(module)),
    "compiled ddp": lambda module: compiled(ddp(module)),
    "ddp of checkpointed": lambda module: ddp(inner(checkpoint_wrapper)(module)),
    "compiled ddp of compiled checkpointed": lambda module: compiled(
        ddp(inner(lambda part: compiled(checkpoint_wrapper(part)))(module))
    ),
}


@pytest.fixture(scope="module", autouse=True)
def world_of_one() -> Iterator[None]:
    """DDP asks for a process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("how", WRAPPED)
def test_names_are_those_of_torch_and_of_the_bare_model(how: str) -> None:
    wrapped = WRAPPED[how](model())
    state = wrapped.state_dict(keep_vars=True)
    names = canonical_names(wrapped, state)
    assert list(names) == list(state)
    assert list(names.values()) == list(model().state_dict())
    assert set(names.values()) == set(get_model_state_dict(wrapped))


def test_tied_weights_keep_both_names() -> None:
    tied = model()
    tied[1]["head"].weight = nn.Parameter(tied[0].module.weight)
    wrapped = ddp(tied)
    assert list(canonical_names(wrapped, wrapped.state_dict()).values()) == list(tied.state_dict())


def test_two_tensors_with_the_same_name_are_rejected() -> None:
    odd = nn.Sequential()
    odd.weight = nn.Parameter(torch.ones(1))
    odd.register_module("_orig_mod", nn.Linear(1, 1, bias=False))
    with pytest.raises(UsageError, match="same name"):
        canonical_names(odd, odd.state_dict())

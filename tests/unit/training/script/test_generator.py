"""A script's own random generators go on where a checkpoint was made."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.training.session_inputs import check_extra
from elastic_ckpt.training.tensors.state_codec import read_state, write_state

GENERATORS: list[tuple[Callable[[], Any], Callable[[Any], object]]] = [
    (lambda: torch.Generator().manual_seed(1), lambda one: torch.rand(2, generator=one).tolist()),
    (lambda: random.Random(1), lambda one: (one.gauss(0, 1), one.random())),
    (lambda: np.random.default_rng(1), lambda one: one.normal(size=3).tolist()),
    (lambda: np.random.Generator(np.random.MT19937(1)), lambda one: one.random(3).tolist()),
    (lambda: np.random.Generator(np.random.Philox(1)), lambda one: one.random(3).tolist()),
    (lambda: np.random.Generator(np.random.SFC64(1)), lambda one: one.random(3).tolist()),
    (lambda: np.random.RandomState(1), lambda one: one.randn(3).tolist()),
]


@pytest.mark.parametrize(("make", "draw"), GENERATORS)
def test_a_generator_continues(tmp_path: Path, make: Any, draw: Any) -> None:
    first, later = make(), make()
    draw(first)
    saved = check_extra({"rng": first})["rng"].state_dict()
    write_state(DiskPart(tmp_path, "tested", 0), "s", saved)
    tree = read_state(tmp_path, "s")
    expected = draw(first), draw(first)
    check_extra({"rng": later})["rng"].load_state_dict(tree)
    assert (draw(later), draw(later)) == expected


def test_another_kind_of_generator_is_refused() -> None:
    saved = check_extra({"rng": random.Random(1)})["rng"].state_dict()
    with pytest.raises(ValueError, match="random Random was saved"):
        check_extra({"rng": torch.Generator()})["rng"].load_state_dict(saved)

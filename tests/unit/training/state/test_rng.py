"""Random state: a restored one draws the same numbers, a preserved one does not change."""

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.training.state.rng import capture_rng, diverge_rng, preserved_rng, restore_rng
from elastic_ckpt.training.tensors.state_codec import read_state, write_state


def draw() -> tuple:
    """From every generator, normal numbers too: they come in pairs, of which one is kept."""
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        torch.rand(3).tolist(),
        torch.randn(1).item(),
    )


@pytest.fixture(autouse=True)
def seeded():
    """Begins with half a pair of normal numbers used up, and ends as it began."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()
    yield
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])


def test_a_restored_state_draws_the_same_numbers():
    state = capture_rng()
    first = [draw() for _ in range(300)]
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert draw() != first[0]
    restore_rng(state)
    assert [draw() for _ in range(300)] == first


def test_a_captured_state_is_a_copy():
    state = capture_rng()
    first = draw()
    for _ in range(3):
        restore_rng(state)
        assert draw() == first


def test_it_survives_serialization(tmp_path):
    write_state(DiskPart(tmp_path, "tested", 0), "rng", capture_rng())
    first = [draw() for _ in range(5)]
    restore_rng(read_state(tmp_path, "rng"))
    assert [draw() for _ in range(5)] == first


def test_another_process_draws_the_same(tmp_path):
    write_state(DiskPart(tmp_path, "tested", 0), "rng", capture_rng())
    code = f"""
import pathlib, random
import torch
from elastic_ckpt.training.state.rng import restore_rng
from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.training.tensors.state_codec import read_state
restore_rng(read_state(pathlib.Path({str(tmp_path)!r}), "rng"))
import numpy as np
print((random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()),
       torch.rand(3).tolist(), torch.randn(1).item()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == repr(draw())


def test_a_state_without_numpy_leaves_numpy_alone():
    state = capture_rng()
    del state["numpy"]
    np.random.seed(11)
    expected = np.random.RandomState(11).rand()
    restore_rng(state)
    assert np.random.rand() == expected


def test_draws_in_the_body_have_no_effect_afterwards():
    state = capture_rng()
    expected = draw()
    restore_rng(state)
    with preserved_rng():
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        inside = draw()
    assert inside != expected
    assert draw() == expected


def test_the_random_state_is_restored_after_an_error():
    state = capture_rng()
    expected = draw()
    restore_rng(state)
    with pytest.raises(ZeroDivisionError), preserved_rng():
        draw()
        raise ZeroDivisionError
    assert draw() == expected


def test_it_may_be_nested():
    state = capture_rng()
    first, second = draw(), draw()
    restore_rng(state)
    with preserved_rng():
        assert draw() == first
        with preserved_rng():
            assert draw() == second
        assert draw() == second
    assert draw() == first


def test_forked_processes_draw_different_numbers():
    """From NumPy as from Python; torch begins with the same seed in every process anyway."""
    code = (
        "import os, random, numpy; from elastic_ckpt.training.state.rng import reseed_numpy\n"
        "for _ in range(2):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        reseed_numpy(); print(random.random(), numpy.random.rand(), flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    first, second = (line.split() for line in done.stdout.splitlines())
    assert set(first).isdisjoint(second)


def test_a_derived_state_draws_different_numbers() -> None:
    """The same ones each time, and others than the next one."""
    state = capture_rng()

    def drawn(number: int) -> tuple[object, ...]:
        restore_rng(state)
        if number:
            diverge_rng(number)
        return random.random(), torch.rand(3).tolist(), np.random.rand(3).tolist()

    found = [drawn(number) for number in (0, 1, 2)]
    assert found == [drawn(number) for number in (0, 1, 2)]
    for position in range(3):
        assert len({repr(each[position]) for each in found}) == 3

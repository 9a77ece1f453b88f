"""GPUs, with a fake driver and a fake torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from elastic_ckpt.cli.doctor import gpus as gpu_findings
from elastic_ckpt.cli.doctor.findings import Finding
from elastic_ckpt.cli.doctor.gpus import check_gpus
from elastic_ckpt.util import gpus, in_child
from elastic_ckpt.util.gpus import Device, Gpus, auto_workers, find_gpus

pytestmark = pytest.mark.one_torch

H100 = Device("NVIDIA H100 80GB HBM3", 85_520_809_984)
TWO = Gpus((H100, H100), "550.54.15")


class NVMLError(Exception):
    pass


class Driver:
    """A fake pynvml."""

    NVMLError = NVMLError

    def __init__(self, count: int = 2, broken: str = "", name: Any = H100.name) -> None:
        self.count, self.broken, self.name = count, broken, name
        self.sizes = True

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError(self.broken)

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> Any:
        return self.name

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        if not self.sizes:
            raise NVMLError("Not Supported")
        return SimpleNamespace(total=H100.bytes)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "550.54.15"


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    found = Driver()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    return found


@pytest.fixture
def torch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set torch's answer; without it a query is an error."""

    def say(answer: dict[str, object] | Exception | str) -> None:
        def run(command: list[str], **named: Any) -> Any:
            assert command[:2] == [sys.executable, "-c"] and named["timeout"] == 60
            if isinstance(answer, Exception):
                raise answer
            text = answer if isinstance(answer, str) else json.dumps(answer)
            return SimpleNamespace(stdout=f"a warning\n{text}\n")

        monkeypatch.setattr(subprocess, "run", run)

    def asked(*given: Any, **named: Any) -> NoReturn:
        raise AssertionError("torch was asked")

    monkeypatch.setattr(subprocess, "run", asked)
    return say


def look(found: Gpus, workers: int, control: Path = Path("/nowhere")) -> dict[str, Finding]:
    return {one.what: one for one in check_gpus(found, workers, control)}


def test_the_driver_is_queried(driver: Driver) -> None:
    assert find_gpus() == TWO
    driver.name, driver.sizes, driver.count = b"Tegra", False, 1
    assert find_gpus() == Gpus((Device("Tegra", 0),), "550.54.15")
    assert "pynvml" not in vars(gpus)


def test_without_driver_or_library(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.broken = "NVML Shared Library Not Found"
    assert find_gpus() == Gpus(why=driver.broken)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert find_gpus() == Gpus(why="nvidia-ml-py is not installed")


def test_a_hanging_driver_is_abandoned(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "QUERY_SECONDS", 0.3)
    monkeypatch.setattr(in_child, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(driver, "nvmlInit", lambda: time.sleep(600), raising=False)
    assert find_gpus() == Gpus(why="did not answer within 0.3 s")


@pytest.mark.usefixtures("torch")
def test_without_a_gpu_torch_is_not_queried() -> None:
    for found in (Gpus(), Gpus(why="NVML Shared Library Not Found")):
        said = look(found, 1)
        assert said["GPUs"].text == "none: training runs on the CPU, over gloo"
        assert said["workers"].text == "--nproc auto starts 1" and len(said) == 2


@pytest.mark.usefixtures("torch")
def test_a_driver_that_does_not_answer_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    found = look(Gpus(why="Driver/library version mismatch"), 1, tmp_path / "nvidiactl")["GPUs"]
    assert found.state == "problem" and "mismatch" in found.text and "reboot" in found.todo


def test_gpus_that_torch_can_use(torch: Callable[..., None]) -> None:
    torch({"cuda": "12.4", "nccl": "2.21.5", "count": 2})
    found = look(Gpus((H100, H100, Device("A10", 0)), "550.54.15"), 2)
    assert {one.state for one in found.values()} == {"ok"}
    assert found["GPUs"].value == 3
    assert found["GPUs"].text == "2 x NVIDIA H100 80GB HBM3, 85.5 GB, 1 x A10; driver 550.54.15"
    assert found["torch on GPUs"].text == "CUDA 12.4, NCCL 2.21.5"


def test_a_different_number_of_workers_and_gpus(torch: Callable[..., None]) -> None:
    torch({"cuda": "12.4", "nccl": "2.21.5", "count": 1})
    found = look(TWO, 2)["workers"]
    assert found.state == "warning" and "torch sees 1 GPU" in found.text
    assert "--nproc 1" in found.todo


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        ({"cuda": "", "nccl": "", "count": 0}, "problem", "without CUDA"),
        ({"cuda": "12.4", "nccl": "", "count": 2}, "problem", "without NCCL"),
        ({"cuda": "12.4", "nccl": "2", "count": 0}, "problem", "sees no GPU"),
        (subprocess.TimeoutExpired("x", 60), "warning", "more than 60 s"),
        (
            subprocess.CalledProcessError(1, "x", stderr="Traceback\nImportError: libcudart\n"),
            "problem",
            "ImportError: libcudart",
        ),
        (subprocess.CalledProcessError(-9, "x", stderr=""), "problem", "exits with -9"),
        ("no JSON", "problem", "malformed"),
    ],
)
def test_an_unusable_torch(torch: Callable[..., None], answer: Any, state: str, says: str) -> None:
    torch(answer)
    found = look(TWO, 2)
    assert found["torch on GPUs"].state == state and says in found["torch on GPUs"].text
    assert "workers" in found


def test_this_torch_can_be_queried() -> None:
    found = gpu_findings.query_torch()
    assert (found.count == 0) or found.cuda


@pytest.mark.parametrize(
    ("visible", "workers"), [("", 1), ("0", 1), ("0,1,2", 3), ("0, 1,", 2), ("GPU-aa,GPU-bb", 2)]
)
def test_one_worker_per_visible_gpu(visible: str, workers: int) -> None:
    assert auto_workers({"CUDA_VISIBLE_DEVICES": visible}) == workers

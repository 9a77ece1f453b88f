"""The GPUs of this machine, as the driver reports them."""

from __future__ import annotations

import contextlib
import glob
import importlib
import os
from collections.abc import Generator, Mapping
from typing import Any, Final

import msgspec

from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer

QUERY_SECONDS: Final = 30.0

NOT_INSTALLED: Final = "nvidia-ml-py is not installed"


class Device(msgspec.Struct, frozen=True):
    """One GPU; ``bytes`` is 0 if the driver does not report its memory."""

    name: str
    bytes: int


class Gpus(msgspec.Struct, frozen=True):
    """The GPUs of this machine.

    Attributes:
        why: the reason that the driver did not answer; empty if it did.
    """

    devices: tuple[Device, ...] = ()
    driver: str = ""
    why: str = ""


def find_gpus() -> Gpus:
    """Return the GPUs; the driver is queried in a child process, because it may hang."""

    def ask() -> Generator[Gpus, None, None]:
        yield query_driver()

    try:
        found: Gpus = answer(ask, Gpus, QUERY_SECONDS)
    except (NoAnswer, WorkFailed) as error:
        return Gpus(why=str(error))
    return found


def auto_workers(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of workers that ``--nproc auto`` starts."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([device for device in visible.split(",") if device.strip()]))
    return max(1, device_count())


def device_count() -> int:
    """Return the number of GPUs whose device files are here, whether they work or not."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def query_driver() -> Gpus:
    """Query the driver in this process; it may hang."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except ImportError:
        return Gpus(why=NOT_INSTALLED)
    except nvml.NVMLError as error:
        return Gpus(why=str(error))
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount())]
        devices = tuple(_device(nvml, handle) for handle in handles)
        return Gpus(devices, _text(nvml.nvmlSystemGetDriverVersion()))
    except nvml.NVMLError as error:
        return Gpus(why=str(error))


def _device(nvml: Any, handle: Any) -> Device:
    size = 0
    with contextlib.suppress(nvml.NVMLError):  # one that shares the host's memory reports none
        size = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
    return Device(_text(nvml.nvmlDeviceGetName(handle)), size)


def _text(value: str | bytes) -> str:
    """Decode; older versions return bytes."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value

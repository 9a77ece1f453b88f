"""The ranks in ``status``, from the board, the process table and the GPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import psutil

from elastic_ckpt.policy.straggler import stragglers
from elastic_ckpt.protocol.slot import Slot
from elastic_ckpt.util.text import printable

NVIDIA_DEVICE = "/dev/nvidiactl"
DRIVER_SECONDS = 2.0

STEPPING: Final = frozenset({"training", "fetching"})
SILENT_SECONDS: Final = 3.0
SILENT_STEPS: Final = 20.0
"""Ranks that have been silent for longer than both make no steps now."""


class WorkerView(msgspec.Struct):
    """One rank.

    Attributes:
        last_beat_seconds: seconds since its last heartbeat; None before the first.
        cpu_percent: of one core, over the process's life.
        gpu_bytes, gpu_percent: GPU memory of the process, and utilization of the GPU; None if
            unknown.
        step_seconds: duration of a step, on average.
        busy_seconds: the rank's own work in a step; for the rest it waits for other ranks.
        slow: its own work divided by that of the other ranks; None unless it is slow.
    """

    rank: int
    local_rank: int
    node: str
    pid: int
    phase: str
    step: int
    last_beat_seconds: float | None
    rss_bytes: int | None
    cpu_percent: float | None
    gpu_bytes: int | None
    gpu_percent: float | None
    step_seconds: float | None
    busy_seconds: float | None
    slow: float | None


def worker_views(boards: Iterable[tuple[str, list[Slot]]]) -> list[WorkerView]:
    """Return all ranks of these nodes, in order."""
    found = [(node, slot) for node, slots in boards for slot in slots]
    slots = [slot for _, slot in found]
    busy = {slot.rank: slot.busy_ns / 1e9 for slot in slots}
    slow = stragglers(busy, max((slot.step_ns for slot in slots), default=0) / 1e9)
    gpus = gpus_by_pid() if os.path.exists(NVIDIA_DEVICE) else {}
    views = [_view(slot, node, slow, gpus) for node, slot in found if slot.pid]
    return sorted(views, key=lambda worker: worker.rank)


def silent_seconds(workers: Sequence[WorkerView]) -> float | None:
    """Return for how long no rank has shown a step; None while they show some, or do something else
    that takes its time, such as a save, an evaluation or a first step."""
    silences = [
        one.last_beat_seconds if one.phase in STEPPING and one.step_seconds else None
        for one in workers
    ]
    known = [silence for silence in silences if silence is not None]
    if not known or len(known) < len(workers):
        return None
    pace = max(one.step_seconds or 0.0 for one in workers)
    silent = min(known)
    return silent if silent > max(SILENT_SECONDS, SILENT_STEPS * pace) else None


class _Gpu(msgspec.Struct, frozen=True):
    bytes: int | None
    percent: float | None


def _view(slot: Slot, node: str, slow: Mapping[int, float], gpus: Mapping[int, _Gpu]) -> WorkerView:
    rss, cpu = _process(slot.pid)
    gpu = gpus.get(slot.pid)
    return WorkerView(
        rank=slot.rank,
        local_rank=slot.local_rank,
        node=node,
        pid=slot.pid,
        phase=slot.phase.name.lower(),
        step=slot.shown_step,
        last_beat_seconds=(time.monotonic_ns() - slot.beat) / 1e9 if slot.beat else None,
        rss_bytes=rss,
        cpu_percent=cpu,
        gpu_bytes=gpu.bytes if gpu else None,
        gpu_percent=gpu.percent if gpu else None,
        step_seconds=slot.step_ns / 1e9 if slot.step_ns else None,
        busy_seconds=slot.busy_ns / 1e9 if slot.busy_ns else None,
        slow=slow.get(slot.rank),
    )


def _process(pid: int) -> tuple[int | None, float | None]:
    """Return resident bytes, and the CPU per cent of one core over the process's life."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            age = max(0.001, time.time() - process.create_time())
            return process.memory_info().rss, 100.0 * (times.user + times.system) / age
    except (psutil.Error, ValueError, OverflowError):
        return None, None


def gpus_by_pid() -> dict[int, _Gpu]:
    """Return each process's use of its GPU, by pid; empty if the driver fails or hangs."""
    from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer

    try:
        found: dict[int, _Gpu] = answer(_ask_driver, dict[int, _Gpu], DRIVER_SECONDS)
    except (WorkFailed, NoAnswer):
        return {}
    return found


def _ask_driver() -> Generator[dict[int, _Gpu], None, None]:
    import pynvml

    found: dict[int, _Gpu] = {}
    nvml: Any = pynvml
    nvml.nvmlInit()
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            device = nvml.nvmlDeviceGetHandleByIndex(index)
            busy = float(nvml.nvmlDeviceGetUtilizationRates(device).gpu)
            for process in nvml.nvmlDeviceGetComputeRunningProcesses(device):
                found[int(process.pid)] = _Gpu(process.usedGpuMemory, busy)
    finally:
        nvml.nvmlShutdown()
    yield found


def reported(slots: Iterable[Slot]) -> dict[str, float]:
    """Return the metrics that rank 0's script reported last."""
    first = next((slot for slot in slots if slot.rank == 0), None)
    return {printable(name): value for name, value in first.metrics.items()} if first else {}

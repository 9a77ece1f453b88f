"""How long a GPU stands still for a save, against a copy to pinned memory.

One rank holds an fp32 model and AdamW state on a CUDA device. In turns: the floor, which copies the
same bytes into pinned host memory that is kept; our save into the memory tier; and the same with
its copies left to go on beside a step's work, where the stall is what the step's end waits for in
all beyond that work.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from harness import Options, Places, Report, goal, places, ratios, read_options, summary

FLOOR = "pinned device-to-host copy, the floor"
OURS = "elastic-ckpt, memory tier"
OVERLAPPED = "elastic-ckpt, memory tier, beside a step"
STEP_PRODUCTS = 60
WARM_UP = 2  # each generation of the memory tier is made by one save


def measure(options: Options, where: Places) -> dict[str, list[float]]:
    """Seconds of each pass by name."""
    import torch
    from savers import OursMemory
    from training_state import make_state

    state = make_state(options.megabytes, wrap=False, device="cuda")
    ours = OursMemory(0, state, where)
    size = max(tensor.nbytes for tensor in state.tensors())
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(step: int) -> None:
        for tensor in state.tensors():
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            pinned[: flat.numel()].copy_(flat, non_blocking=True)
        torch.cuda.synchronize()

    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def work() -> None:
        for _ in range(STEP_PRODUCTS):
            matrix @ matrix

    def beside(step: int) -> None:
        save = ours.new_save(step)
        save.begin(overlap=True)
        work()
        save.guard()
        torch.cuda.synchronize()
        if save.under_way:
            save.complete()

    def stall_beside(step: int) -> float:
        alone = _seconds(work)
        return max(0.0, _seconds(partial(beside, step)) - alone)

    acts: dict[str, Callable[[int], float]] = {
        FLOOR: lambda step: _seconds(partial(copy, step)),
        OURS: lambda step: _seconds(partial(ours.save, 2 * step)),
        OVERLAPPED: lambda step: stall_beside(2 * step + 1),
    }
    found: dict[str, list[float]] = {name: [] for name in acts}
    try:
        for step in range(1, options.repeats + WARM_UP + 1):
            for name, act in acts.items():
                seconds = act(step)
                ours.settle()
                if step > WARM_UP:
                    found[name].append(seconds)
        return found
    finally:
        ours.close()


def _seconds(act: Callable[[], Any]) -> float:
    import torch

    torch.cuda.synchronize()
    began = time.perf_counter()
    act()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Print the table, or that there is no device."""
    import torch
    import torch.distributed as dist

    options = read_options(__doc__, megabytes=5000.0)
    if not torch.cuda.is_available():
        print("gpu_stall: not run, there is no CUDA device")
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ.update(
            RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(listener.getsockname()[1]),
        )  # fmt: skip
    dist.init_process_group("gloo")
    with places(options.directory) as where:
        found = measure(options, where)
    title = f"Stall per save on {torch.cuda.get_device_name()}, {options.megabytes / 1e3:.0f} GB"
    report = Report("gpu_stall", title, {"megabytes": options.megabytes})
    report.rows = [summary(name, values, found[FLOOR]) for name, values in found.items()]
    what = "stall per save / pinned copy of the same bytes"
    report.goals.append(goal(what, ratios(found[OURS], found[FLOOR]), 1.2))
    what = "stall of a save beside a step / pinned copy of the same bytes"
    report.goals.append(goal(what, ratios(found[OVERLAPPED], found[FLOOR]), 1.0))
    report.show(options)


if __name__ == "__main__":
    main()

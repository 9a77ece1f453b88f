"""How long training stands still for a save.

Two gloo ranks hold the same fp32 model and AdamW state, as under DistributedDataParallel, and save
it in turns in every way that runs here. The stall is the time between two barriers around the
save. Beside it: one pass in place over all state right afterwards, which shows what a save leaves
for the next step to pay (pages that a forked child holds must be copied then), and by how much
the ranks' memory grew at most until everything was settled.

The contestants run in groups that fit into memory together; each group has the floor, and a
ratio is to the floor of the same pass.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import (
    Options,
    Places,
    Report,
    Row,
    goal,
    places,
    progress,
    ratios,
    read_options,
    summary,
)
from ranks import run_ranks

FLOOR = "memcpy floor"
ONE_THREAD = "memcpy by one thread"
OURS = "elastic-ckpt, memory tier"
OURS_COLOSSALAI = "elastic-ckpt, memory tier, ColossalAI engine"
COLOSSALAI = "ColossalAI save_checkpoint"
BARE_UPDATE = "no save"
WARM_UP = 2  # each generation of the memory tier is made by one save


@dataclass
class Found:
    """One contestant's passes, as rank 0 saw them, or why there are none."""

    how: str = ""
    why_not: str = ""
    stalls: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    grown: list[float] = field(default_factory=list)


def groups() -> list[list[type]]:
    """Contestants by the group that they share memory with; the floor is in each."""
    import saver_peers as peers
    import savers

    return [
        [savers.MemcpyOnce, savers.OursMemory, savers.Ours, savers.TorchSave,
         savers.TorchSaveSynced, savers.Safetensors, savers.SafetensorsSynced, savers.DcpSync,
         peers.DLRoverFlash, peers.NvrxFork, peers.NvrxLocal],
        [savers.OursMemory, savers.DcpAsync, savers.DcpAsyncReused, savers.DcpProcess],
        [peers.OursColossalAI, peers.ColossalAISave, peers.ColossalAISaveSynced],
    ]  # fmt: skip


def contest(rank: int, group: int, options: Options, where: Places) -> tuple[int, dict[str, Found]]:
    """All passes of one group on one rank; bytes of the state, and what was found."""
    import torch.distributed as dist
    from savers import Memcpy
    from training_state import make_state

    state = make_state(options.megabytes, wrap=True)
    found: dict[str, Found] = {BARE_UPDATE: Found()}
    savers: dict[str, Any] = {}
    for kind in [Memcpy, *groups()[group]]:
        made, why_not = _try(partial(kind, rank, state, where))
        found[kind.name] = Found(kind.how, why_not)
        if not why_not:
            savers[kind.name] = made
    try:
        for step in range(1, options.repeats + WARM_UP + 1):
            dist.barrier()
            warm = step <= WARM_UP
            update = _seconds(state.change)
            if not warm:
                found[BARE_UPDATE].updates.append(update)
            for name in list(savers):
                measured, why_not = _try(partial(_measure, savers[name], state, step))
                if why_not:
                    found[name].why_not = why_not
                    _try(savers.pop(name).close)
                elif not warm:
                    found[name].stalls.append(measured[0])
                    found[name].updates.append(measured[1])
                    found[name].grown.append(measured[2])
    finally:
        for saver in savers.values():
            saver.close()
    return state.nbytes, found


def _measure(saver: Any, state: Any, step: int) -> tuple[float, float, float]:
    """Seconds of the stall and of an update behind it, and bytes by which both ranks grew."""
    import torch
    import torch.distributed as dist

    if saver.rank == 0:
        os.sync()  # what one left must not be the next one's burden
    before = _reset_peak()
    dist.barrier()
    began = time.perf_counter()
    saver.save(step)
    dist.barrier()
    stall = time.perf_counter() - began
    update = _seconds(state.change)
    saver.settle()
    grown = torch.tensor(float(_peak() - before))
    dist.all_reduce(grown)
    return stall, update, float(grown)


def _seconds(act: Any) -> float:
    """Until every rank is through."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    act()
    dist.barrier()
    return time.perf_counter() - began


def _try(act: Any) -> tuple[Any, str]:
    """What it returned, or the first reason of any rank why it failed. Collective."""
    import traceback

    import torch.distributed as dist

    result, why = None, ""
    try:
        result = act()
    except Exception as error:
        traceback.print_exc()
        text = (str(error).strip().splitlines() or [""])[0]
        why = text if type(error).__name__ == "NotHere" else f"{type(error).__name__}: {text}"
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, why)
    return result, next((reason for reason in told if reason), "")


def _reset_peak() -> int:
    """Bytes that this process has now, from where its peak is counted again."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rows_of(found: dict[str, Found], floor: list[float]) -> list[Row]:
    """One row for each contestant of a group."""
    rows = []
    for name, one in found.items():
        if name == BARE_UPDATE:
            continue
        if one.why_not:
            rows.append(Row(name, note=f"does not run here: {one.why_not}"))
            continue
        more = {"update after, s": one.updates, "grew, MB": [grown / 1e6 for grown in one.grown]}
        rows.append(summary(name, one.stalls, floor, one.how, more))
    return rows


def main() -> None:
    """Run every group and print one table."""
    options = read_options(__doc__)
    report = Report("save_stall", "", {"megabytes": options.megabytes, "ranks": 2})
    against_floor: list[float] = []
    against_one: list[float] = []
    nbytes, updates = 0, []
    with places(options.directory) as where:
        for number in range(len(groups())):
            progress(f"group {number + 1} of {len(groups())}")
            own = where.inside(f"group-{number}")
            nbytes, found = run_ranks(contest, own.disk / "log", number, options, own)[0]
            floor = found[FLOOR].stalls
            updates += found[BARE_UPDATE].updates
            seen = {row.name for row in report.rows}
            rows = rows_of(found, floor)
            report.rows += [row for row in rows if row.name not in seen]
            for name, one in found.items():
                if name == OURS and one.stalls:
                    against_floor += ratios(one.stalls, floor)
                    if ONE_THREAD in found:
                        against_one = ratios(one.stalls, found[ONE_THREAD].stalls)
            theirs, ours = found.get(COLOSSALAI), found.get(OURS_COLOSSALAI)
            if theirs and ours and theirs.stalls and ours.stalls:
                what = "stall per save, ColossalAI engine / ColossalAI's own save"
                report.goals.append(goal(what, ratios(ours.stalls, theirs.stalls), 0.25))
    report.title = f"Stall per save, {nbytes / 1e6:.0f} MB of state, 2 ranks"
    report.settings["state_bytes"] = nbytes
    if against_floor:
        what = "stall per save, torch engine / memcpy of the same bytes by both ranks"
        report.goals.insert(0, goal(what, against_floor, 1.2))
        what = "stall per save, torch engine / memcpy of the same bytes by one thread"
        report.goals.insert(0, goal(what, against_one, 1.2))
    report.notes.append(
        f"an update without a save before it: {sorted(updates)[len(updates) // 2]:.3f} s"
    )
    report.show(options)


if __name__ == "__main__":
    main()

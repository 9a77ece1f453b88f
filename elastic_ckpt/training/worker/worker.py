"""A supervised worker: bind it to its parents, show it on the board, run the script."""

from __future__ import annotations

import atexit
import functools
import logging
import multiprocessing
import os
import platform
import runpy
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import torch
from torch import distributed

from elastic_ckpt.checkpoint.memory.mapped_file import Mappings
from elastic_ckpt.checkpoint.memory.seal import Share
from elastic_ckpt.checkpoint.memory.tier import MemoryTier
from elastic_ckpt.checkpoint.nodes.tier import NodesMemory
from elastic_ckpt.errors import ElasticCkptError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.process_log import ProcessLog
from elastic_ckpt.protocol.board import Board
from elastic_ckpt.protocol.slot import Outcome, SlotWriter
from elastic_ckpt.protocol.worker_spec import WorkerSpec
from elastic_ckpt.training import runtime
from elastic_ckpt.training.ranks.rank_errors import describe
from elastic_ckpt.training.state.rng import reseed_numpy
from elastic_ckpt.training.tensors.device_copy import pin, unpin
from elastic_ckpt.training.worker.signal_shield import (
    ignore_notices,
    set_terminate_hook,
    shield_data_loaders,
)
from elastic_ckpt.training.worker.stdio import keep_output
from elastic_ckpt.util.processes import die_with_parent
from elastic_ckpt.util.text import printable

log = logging.getLogger(__name__)


def main(payload: bytes) -> None:
    """Run the script as ``python script.py`` would, in a freshly forked process. If it fails,
    SystemExit with its exit code."""
    _die_with_template()
    ignore_notices()
    # A process forked from a forkserver would start its own children from it as well.
    multiprocessing.set_start_method(None, force=True)
    reseed_numpy()
    spec = msgspec.json.decode(payload, type=WorkerSpec)
    job = JobDirectory.at(spec.directory)
    board = Board.open(spec.board)
    if board.is_over(spec.incarnation):
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    slot = board.rank_slot(local_rank)
    slot.launched(int(os.environ["RANK"]), os.getpid())
    os.environ[runtime.RANK_PID] = str(os.getpid())
    keep_output(spec.output, local_rank)
    process_log = _start_log(job, spec, board, local_rank)
    try:
        _install_context(job, spec, board, slot)
        if board.stop_wanted:
            log.info("a stop is requested: exits before the script starts")
            slot.leave(Outcome.STOPPED_UNSAVED)
            return
        shield_data_loaders()
        mark_group(slot)
        _run_script(spec)
    finally:
        process_log.end()


def _start_log(job: JobDirectory, spec: WorkerSpec, board: Board, local_rank: int) -> ProcessLog:
    rank = int(os.environ["RANK"])

    def known() -> dict[str, int]:
        slot = board.read_slot(local_rank)
        about = {"incarnation": spec.incarnation, "rank": rank}
        return {**about, "step": slot.shown_step} if slot.attached else about

    started = ProcessLog.of_worker(job, spec.node, spec.incarnation, rank, known).begin()
    log.info(  # without the arguments, which may contain secrets
        "starts: Python %s, torch %s, %s with %d arguments, rank %d of %s",
        platform.python_version(), torch.__version__, spec.script, len(spec.args), rank,
        os.environ.get("WORLD_SIZE", "?"),
    )  # fmt: skip
    return started


def _install_context(job: JobDirectory, spec: WorkerSpec, board: Board, slot: SlotWriter) -> None:
    """Let a Session find its job, and the supervisor inspect this worker."""
    memory = _memory(spec)
    bucket = None
    if spec.bucket is not None:
        from elastic_ckpt.training.state.shared_bucket import RankBucket

        bucket = RankBucket(spec.bucket, job)
    runtime.install(runtime.Supervised(spec, job, board, slot, memory, bucket))
    set_terminate_hook(_leave_if_idle)
    _allow_py_spy(spec.board)


def _memory(spec: WorkerSpec) -> MemoryTier | None:
    root, mappings = Path(spec.memory or os.devnull), Mappings(pin, unpin)
    host, port, token = spec.memory_server
    if not host:
        return MemoryTier(root, mappings) if spec.memory else None
    local, count = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    share = Share(int(os.environ["RANK"]) - local, count, host, port, token, spec.domain)
    return NodesMemory(root, share, acts=local == 0, replicas=spec.replicas, mappings=mappings)


def _run_script(spec: WorkerSpec) -> None:
    context, worker = runtime.supervised(), os.getpid()
    sys.argv = [spec.script, *spec.args]
    sys.path.insert(0, os.getcwd() if spec.module else os.path.dirname(spec.script))
    code, reason = _outcome(spec)
    if os.getpid() != worker:
        _end_interpreter()
        os._exit(code)  # a child that the script forked must not report the rank's outcome
    if code:
        context.slot.leave(Outcome.FAILED, code, reason)
    log.info("the script ended with exit code %d%s", code, f", {reason}" if reason else "")
    # What the script registered at exit belongs to its work: an upload, a last log line.
    _end_interpreter()
    if code:
        raise SystemExit(code)
    # Without a Session nobody knows whether the script was done: many handle SIGTERM themselves.
    left = context.leaves_unfinished
    context.slot.leave(Outcome.STOPPED_UNSAVED if left else Outcome.COMPLETED)


def _outcome(spec: WorkerSpec) -> tuple[int, str]:
    """Run the script; return its exit code, and one line on why if that is not 0."""
    try:
        if spec.module:
            runpy.run_module(spec.module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(spec.script, run_name="__main__")
    except SystemExit as leaving:
        return _exit_code(leaving)
    except ElasticCkptError as error:
        log.exception("the script ended with an elastic-ckpt error")
        print(f"elastic-ckpt: error: {printable(str(error), 4000)}", file=sys.stderr)
        return int(error.exit_code), describe(error)
    except BaseException as error:
        log.exception("the script raised")
        rank = os.environ.get("RANK", "?")
        print(f"elastic-ckpt: rank {rank}: the script raised", file=sys.stderr)
        traceback.print_exc()
        return 1, describe(error)
    return 0, ""


def _exit_code(leaving: SystemExit) -> tuple[int, str]:
    """Return the exit code as a shell sees it: the low eight bits, or 1 for a text."""
    if leaving.code is None:
        return 0, ""
    if isinstance(leaving.code, int):
        return leaving.code & 0xFF, ""
    text = str(leaving.code)
    print(text, file=sys.stderr)
    return 1, next(iter(text.strip().splitlines()), "")


def _end_interpreter() -> None:
    """Do what Python does at exit, and a forked process that ends with ``os._exit`` does not."""
    threads: Any = threading
    threads._shutdown()
    hooks: Any = atexit
    hooks._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()


def _leave_if_idle(number: int, frame: FrameType | None) -> None:
    """End the worker on a SIGTERM only if a stop is requested and the script does not take part."""
    context = runtime.supervised()
    if context.board.stop_wanted and not context.attached:
        context.slot.leave(Outcome.STOPPED_UNSAVED)
        raise SystemExit(0)


def _allow_py_spy(board: str) -> None:
    """Let the supervisor, which owns the board, and its children read this process's stack, also
    where Yama restricts that to parents (ptrace_scope 1)."""
    import ctypes

    supervisor = int(board.split("/")[2])
    ctypes.CDLL(None).prctl(0x59616D61, supervisor, 0, 0, 0)  # PR_SET_PTRACER


def _die_with_template() -> None:
    """Make the kernel kill this process when the template that it was forked from dies."""
    parent = os.getppid()
    die_with_parent()
    if os.getppid() != parent or parent == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def mark_group(slot: SlotWriter) -> None:
    """Record on the board when the first ``init_process_group`` begins and ends.

    A module that imported the function from ``torch.distributed`` earlier is not observed: its time
    counts as building the model.
    """
    dist: Any = distributed
    plain = dist.init_process_group

    @functools.wraps(plain)
    def marked(*args: Any, **options: Any) -> Any:
        dist.init_process_group = plain
        slot.group_begins()
        try:
            return plain(*args, **options)
        finally:
            slot.group_is_made()

    dist.init_process_group = marked

"""A worker under a supervisor: tie it to its parents, show it on the board, run the script."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import time
import traceback
from types import FrameType
from typing import Any

import msgspec
from torch.distributed.elastic.multiprocessing import errors as elastic_errors

from elastic_ckpt.board import Board, Outcome
from elastic_ckpt.core.agreement import RequestKind
from elastic_ckpt.errors import ElasticCkptError, ExitCode
from elastic_ckpt.store.layout import JobDirectory
from elastic_ckpt.training import runtime
from elastic_ckpt.training.signals import ignore_notices, set_terminate_hook, shield_data_loaders


class _Spec(msgspec.Struct, frozen=True, kw_only=True):
    """The part of the supervisor's ``WorkerSpec`` that a worker needs."""

    script: str
    args: list[str]
    directory: str
    job: str
    node: str
    board: str
    save_interval_steps: int = 0


def main(payload: bytes) -> None:
    """Run the script as ``python script.py`` would; called in a freshly forked process."""
    _die_with_template()
    ignore_notices()
    # Being forked from a forkserver made that this process's own way to start children, too.
    multiprocessing.set_start_method(None, force=True)
    spec = msgspec.json.decode(payload, type=_Spec)
    board = Board.open(spec.board)
    local_rank = int(os.environ["LOCAL_RANK"])
    slot = board.rank_slot(local_rank)
    slot.launched(int(os.environ["RANK"]), os.getpid())
    context = runtime.Supervised(
        job=JobDirectory.at(spec.directory),
        name=spec.job,
        node=spec.node,
        board=board,
        slot=slot,
        save_interval_steps=spec.save_interval_steps,
    )
    runtime.install(context)
    set_terminate_hook(_leave_if_idle)
    if _stop_wanted(board):
        slot.leave(Outcome.STOPPED_UNSAVED)
        return
    shield_data_loaders()
    _run_script(spec)


def _run_script(spec: _Spec) -> None:
    context = runtime.supervised()
    sys.argv = [spec.script, *spec.args]
    sys.path.insert(0, os.path.dirname(os.path.abspath(spec.script)))
    for stream in (sys.stdout, sys.stderr):
        # A worker may be killed at any moment; what it printed until then should be seen.
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        runpy.run_path(spec.script, run_name="__main__")
    except SystemExit as leaving:
        code = _exit_code(leaving)
        if code == 0:
            context.finish(Outcome.COMPLETED)
            return
        context.finish(Outcome.FAILED, code)
        raise
    except ElasticCkptError as error:
        print(f"elastic-ckpt: error: {error}", file=sys.stderr)
        _fail(error, int(error.exit_code))
    except BaseException as error:
        rank = os.environ.get("RANK", "?")
        print(f"elastic-ckpt: rank {rank}: the script raised", file=sys.stderr)
        traceback.print_exc()
        _fail(error, 1)
    else:
        context.finish(Outcome.COMPLETED)


def _fail(error: BaseException, code: int) -> None:
    handler: Any = elastic_errors
    handler.get_error_handler().record_exception(error)
    runtime.supervised().finish(Outcome.FAILED, code)
    sys.stdout.flush()
    sys.stderr.flush()
    raise SystemExit(code)


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code
    print(leaving.code, file=sys.stderr)
    return 1


def _stop_wanted(board: Board) -> bool:
    return any(answer.kind is RequestKind.STOP for answer in board.answers().values())


def _leave_if_idle(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a worker only if a stop is wanted and the script takes no part in it."""
    context = runtime.supervised()
    if _stop_wanted(context.board) and not context.attached:
        context.finish(Outcome.STOPPED_UNSAVED)
        raise SystemExit(int(ExitCode.FINISHED))


def _die_with_template() -> None:
    """Have the kernel kill this process with the template that it was forked from."""
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent or parent == 1:
        time.sleep(0)
        os.kill(os.getpid(), signal.SIGKILL)

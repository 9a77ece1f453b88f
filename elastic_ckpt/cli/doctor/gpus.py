"""The GPUs of this machine, and whether torch can use them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.util.gpus import Gpus
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed
from elastic_ckpt.util.units import human_bytes

_TORCH_SECONDS: Final = 60.0
_ASK_TORCH: Final = """
import json, sys
sys.path[:1] = []
import torch
cuda = torch.version.cuda or ""
count = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and has_nccl else ""
print(json.dumps({"cuda": cuda, "nccl": nccl, "count": count}))
"""
"""Without the working directory on the path, so that it cannot shadow torch."""


class _Torch(msgspec.Struct, frozen=True):
    """The CUDA and NCCL versions of torch, empty without, and the number of GPUs it sees."""

    cuda: str
    nccl: str
    count: int


def check_gpus(
    found: Gpus, workers: int, control: Path = Path("/dev/nvidiactl"), python: str = ""
) -> Iterator[Finding]:
    """Check the GPUs, torch on them, and the number of workers.

    Args:
        workers: number of workers that ``--nproc auto`` starts.
        control: exists if a driver is loaded.
        python: the interpreter whose torch is asked; empty for this one.
    """
    if found.why and control.exists():
        todo = "run nvidia-smi; reboot after a driver update"
        yield Finding("GPUs", "problem", f"the driver does not answer: {found.why}", todo)
    elif not found.devices:
        yield ok("GPUs", "none: training runs on the CPU, over gloo", 0, "count")
        yield _workers(workers)
    else:
        kinds = Counter(found.devices)
        shown = ", ".join(
            f"{count} x {one.name}" + (f", {human_bytes(one.bytes)}" if one.bytes else "")
            for one, count in kinds.items()
        )
        yield ok("GPUs", f"{shown}; driver {found.driver}", len(found.devices), "count")
        yield from _torch(workers, python)


def _torch(workers: int, python: str) -> Iterator[Finding]:
    try:
        found = query_torch(python)
    except NoAnswer as error:
        todo = "find out why import torch takes so long"
        yield Finding("torch on GPUs", "warning", str(error), todo)
    except WorkFailed as error:
        todo = "fix the error of: python -c 'import torch'"
        yield Finding("torch on GPUs", "problem", str(error), todo)
    else:
        if not found.cuda:
            todo = "install a torch with CUDA (see pytorch.org)"
            yield Finding("torch on GPUs", "problem", "built without CUDA", todo)
        elif not found.count:
            text = f"built for CUDA {found.cuda}, but sees no GPU"
            todo = "check CUDA_VISIBLE_DEVICES, and that the driver supports this CUDA version"
            yield Finding("torch on GPUs", "problem", text, todo)
        elif not found.nccl:
            text = f"CUDA {found.cuda}, without NCCL"
            todo = "install a torch with NCCL, which several workers need on GPUs"
            yield Finding("torch on GPUs", "problem", text, todo)
        else:
            yield ok("torch on GPUs", f"CUDA {found.cuda}, NCCL {found.nccl}")
        yield _workers(workers, found.count or None)
        return
    yield _workers(workers)


def _workers(workers: int, seen: int | None = None) -> Finding:
    text = f"--nproc auto starts {workers}"
    if seen is None or seen == workers:
        return ok("workers", text, workers, "count")
    todo = f"give --nproc {seen}, or set CUDA_VISIBLE_DEVICES to the GPUs to use"
    text += f", but torch sees {seen} GPU{'s' if seen > 1 else ''}"
    return Finding("workers", "warning", text, todo, workers, "count")


def query_torch(python: str = "") -> _Torch:
    """Query torch in another process: its import takes seconds and may initialize the GPUs."""
    try:
        done = subprocess.run(
            [python or sys.executable, "-c", _ASK_TORCH],
            capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL,
            timeout=_TORCH_SECONDS, check=True,
        )  # fmt: skip
        return msgspec.json.decode(done.stdout.splitlines()[-1], type=_Torch)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"import torch takes more than {_TORCH_SECONDS:.0f} s") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines() or [f"exits with {error.returncode}"]
        raise WorkFailed(last[-1]) from None
    except (OSError, IndexError, msgspec.MsgspecError) as error:
        raise WorkFailed(str(error)) from None

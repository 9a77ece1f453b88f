"""Files that somebody else's code writes by ``torch.save``, led through a part."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from elastic_ckpt.checkpoint.part import Part
from elastic_ckpt.training.engines.colossalai.torch_archive import plan_archive

Takes = Callable[[str, Any, int], bool]
"""Whether this rank writes a file: its path in the part, what it is to hold, bytes of tensors."""


def _always(path: str, obj: Any, tensor_bytes: int) -> bool:
    return True


@contextmanager
def torch_save_through(directory: Path, part: Part, takes: Takes = _always) -> Iterator[None]:
    """Have every ``torch.save`` to a path below ``directory`` write through ``part``.

    ColossalAI names files, it does not open them. A tensor is copied once, without the passes
    that ``torch.save`` makes over it (see :mod:`elastic_ckpt.training.engines.colossalai.torch_archive`); a call
    with options, or for something that cannot be laid out beforehand, is left to torch.

    Args:
        takes: asked once for each file; if it says no, nothing is written.
    """
    plain = torch.save
    root = os.path.abspath(directory)

    def save(obj: Any, f: Any, *args: Any, **options: Any) -> None:
        path = os.path.abspath(f) if isinstance(f, str | os.PathLike) else ""
        if not path.startswith(root + os.sep):
            plain(obj, f, *args, **options)
            return
        archive = None if args or options else plan_archive(obj)
        name = os.path.relpath(path, root)
        if not takes(name, obj, archive.tensor_bytes if archive else 0):
            return  # it may be there by now, and must not be touched: another rank writes it
        if os.path.lexists(path):
            plain(obj, f, *args, **options)
            return
        with part.open(name, archive.size if archive else None) as file:
            if archive is not None:
                archive.write(file)
            else:
                stream: Any = file  # torch asks for less than a whole file
                plain(obj, stream, *args, **options)

    torch.save = save
    try:
        yield
    finally:
        torch.save = plain

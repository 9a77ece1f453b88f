"""Protection from code in files that other libraries read with ``torch.load``."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.text import printable

_FORCE_WEIGHTS_ONLY: Final = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_ARCHIVE: Final = b"PK\x03\x04"
"""The first bytes of a file that torch 1.6 or later has written."""


class PlainUnpickler(pickle.Unpickler):
    """Unpickles numbers, texts, lists and dicts, but nothing that is imported, and so no code."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        """Reject any import with CheckpointRejected."""
        raise CheckpointRejected(
            f"a file of the checkpoint contains {printable(f'{module_name}.{global_name}', 100)}, "
            "which may run code"
        )


@contextmanager
def weights_only(directory: Path) -> Iterator[None]:
    """Make every ``torch.load`` in the body reject code, whatever its caller requests.

    Files outside ``directory`` are rejected as well, and so are two kinds for which torch 2.5
    ignores ``weights_only``: TorchScript, and files of versions before 1.6.
    """
    plain, plain_script = torch.load, torch.jit.load
    root = os.path.realpath(directory)

    def load(f: Any, *args: Any, **options: Any) -> Any:
        if isinstance(f, str | os.PathLike):
            _check_archive(os.fspath(f), root)
        return plain(f, *args, **{**options, "weights_only": True})

    before = os.environ.get(_FORCE_WEIGHTS_ONLY)
    os.environ[_FORCE_WEIGHTS_ONLY] = "1"
    torch.load, torch.jit.load = load, _refuse_script
    try:
        yield
    finally:
        torch.load, torch.jit.load = plain, plain_script
        if before is None:
            del os.environ[_FORCE_WEIGHTS_ONLY]
        else:
            os.environ[_FORCE_WEIGHTS_ONLY] = before


def _check_archive(path: str, root: str) -> None:
    if not os.path.realpath(path).startswith(root + os.sep):
        raise CheckpointRejected(f"{printable(path)} is outside the checkpoint")
    with open(open_regular(Path(path)), "rb") as file:
        if file.read(len(_ARCHIVE)) != _ARCHIVE:
            raise CheckpointRejected(f"{os.path.basename(path)} is not a torch archive")


def _refuse_script(*_: Any, **__: Any) -> NoReturn:
    raise CheckpointRejected("a file of the checkpoint contains TorchScript, which is code")

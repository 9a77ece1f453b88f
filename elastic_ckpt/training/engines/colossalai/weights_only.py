"""``torch.load`` inside of code that is not ours, kept from running what it reads."""

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
"""How a file begins that torch has written since 1.6."""


class PlainUnpickler(pickle.Unpickler):
    """Numbers, texts, lists, dicts; nothing that has to be imported, and so no code."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        """Refuse.

        Raises:
            CheckpointRejected: always.
        """
        raise CheckpointRejected(
            f"a file of the checkpoint holds {printable(f'{module_name}.{global_name}', 100)}, "
            "which may run code"
        )


@contextmanager
def weights_only(directory: Path) -> Iterator[None]:
    """Make every ``torch.load`` inside refuse code, whatever its caller asked for.

    Files outside of ``directory`` are refused, too, and so are two kinds that torch 2.5 reads
    with no regard for ``weights_only``: TorchScript, and what versions before 1.6 wrote.
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
        raise CheckpointRejected(f"{printable(path)} is outside of the checkpoint")
    fd = open_regular(Path(path))
    try:
        if os.read(fd, len(_ARCHIVE)) != _ARCHIVE:
            raise CheckpointRejected(f"{os.path.basename(path)} is no archive of tensors")
    finally:
        os.close(fd)


def _refuse_script(*_: Any, **__: Any) -> NoReturn:
    raise CheckpointRejected("a file of the checkpoint holds TorchScript, which is code")

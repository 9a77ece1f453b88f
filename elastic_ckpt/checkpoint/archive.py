"""What a file of tensors says about itself: whether it is whole. Nothing is unpickled."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import IO, Final

import msgspec

from elastic_ckpt.errors import CheckpointRejected
from elastic_ckpt.util.files import open_regular
from elastic_ckpt.util.text import printable

_ZIP: Final = b"PK\x03\x04"
_CHUNK_BYTES: Final = 1024 * 1024
_MAX_HEADER_BYTES: Final = 100 * 1024 * 1024  # safetensors' own limit


class _Tensor(msgspec.Struct):
    data_offsets: tuple[int, int] = (0, 0)


def is_archive(path: Path, *, with_checksums: bool = False) -> bool:
    """Return whether a file is of a kind that shows its own end: a zip archive, or safetensors,
    which has no checksums of its bytes."""
    if path.suffix == ".safetensors":
        return not with_checksums
    try:
        with open(open_regular(path), "rb") as file:
            return file.read(len(_ZIP)) == _ZIP
    except OSError:  # the script replaces it at this moment
        return False


def check_archive(root: Path, name: str) -> int:
    """Read a file to its end if it is an archive of tensors, of torch or safetensors; its size.

    Raises:
        CheckpointRejected: it is torn, or is no archive although ``torch.save`` names it so.
    """
    fd = open_regular(root / name)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if name.endswith(".safetensors"):
            _check_safetensors(file, name, size)
        elif file.read(len(_ZIP)) == _ZIP:
            _check_zip(file, name)
        elif name.endswith(".bin"):
            raise CheckpointRejected(f"{name} is no archive of tensors, or has lost its begin")
    return size


def _check_zip(file: IO[bytes], name: str) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as record:
                    while record.read(_CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise CheckpointRejected(f"{name} is damaged: {printable(str(error), 200)}") from None


def _check_safetensors(file: IO[bytes], name: str, size: int) -> None:
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise ValueError("its header is cut off")
        tensors = msgspec.json.decode(file.read(length), type=dict[str, _Tensor])
        end = max((one.data_offsets[1] for one in tensors.values()), default=0)
        if size != 8 + length + end:
            raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
    except (ValueError, msgspec.MsgspecError) as error:
        raise CheckpointRejected(f"{name} is damaged: {printable(str(error), 200)}") from None

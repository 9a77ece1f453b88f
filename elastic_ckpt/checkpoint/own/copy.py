"""Copies of checkpoints that the script overwrites in place: the last whole one must remain."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from elastic_ckpt.util.files import create_file, open_regular, remove_tree, sync_directory

_FICLONE: Final = 0x40049409
_CHUNK_BYTES: Final = 64 * 1024 * 1024


def copy_files(source: Path, names: Iterable[str], target: Path, *, link: bool = False) -> None:
    """Copy files below ``source`` to the new directory ``target``; durable on return.

    A file system that can share blocks (btrfs, xfs) copies nothing.

    Args:
        link: make hard links where that is possible: only if the script replaces its files and
            never writes into them.

    Raises:
        OSError: one cannot be read, or the disk is full; ``target`` is removed then.
    """
    try:
        target.mkdir(mode=0o700)
        directories = {target}
        for name in names:
            place = target / name
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directories |= {one for one in place.parents if target in one.parents}
            _copy(source / name, place, link=link)
        for directory in directories:
            sync_directory(directory)
        sync_directory(target.parent)
    except BaseException:
        remove_tree(target)
        raise


def _copy(source: Path, target: Path, *, link: bool) -> None:
    if link:
        with contextlib.suppress(OSError):
            os.link(source, target, follow_symlinks=False)
            return
    read = open_regular(source)
    try:
        write = create_file(target)
        try:
            try:
                fcntl.ioctl(write, _FICLONE, read)
            except OSError:  # most file systems share no blocks
                _copy_bytes(read, write)
            os.fsync(write)
        finally:
            os.close(write)
    finally:
        os.close(read)


def _copy_bytes(read: int, write: int) -> None:
    while True:
        try:
            if not os.copy_file_range(read, write, _CHUNK_BYTES):
                return
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            with os.fdopen(os.dup(read), "rb") as source, os.fdopen(os.dup(write), "wb") as target:
                shutil.copyfileobj(source, target, 2 * 1024 * 1024)
            return


def put_back(copy: Path, target: Path, names: Iterable[str], *, is_file: bool) -> None:
    """Put a copy where the script looks for its checkpoint, in one rename.

    What stands there must have been set aside. OSError as :func:`copy_files`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    place = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    copy_files(copy, names, place)
    try:
        os.rename(place / target.name if is_file else place, target)
    finally:
        remove_tree(place)
    sync_directory(target.parent)

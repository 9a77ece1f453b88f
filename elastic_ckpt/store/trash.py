"""Deletion that a kill cannot leave half-done: what goes is renamed away first.

``.trash`` is emptied after the rename, and again at the next start; nothing is ever read from it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

from elastic_ckpt.util.files import remove_tree, sync_directory
from elastic_ckpt.jobdir.paths import JobDirectory, checkpoint_key

_NAME = re.compile(r"(.+)-[0-9a-f]{8}")


def throw_away(job: JobDirectory, checkpoint: Path) -> Path:
    """Take a checkpoint out of the catalog, durably; its bytes are still there.

    Raises:
        DirectoryUnusable: a link stands where the trash belongs.
        OSError: it is gone, or the disk says no.
    """
    job.require(job.trash)
    target = job.trash / f"{checkpoint.name}-{secrets.token_hex(4)}"
    os.rename(checkpoint, target)
    sync_directory(checkpoint.parent)
    return target


def empty_trash(job: JobDirectory, hurry: Callable[[], bool] = lambda: False) -> None:
    """Delete what was thrown away; what cannot be deleted now waits for the next time.

    Args:
        hurry: asked before each one; True leaves the rest.
    """
    if not job.owns(job.trash):
        return
    with contextlib.suppress(FileNotFoundError):
        for entry in list(os.scandir(job.trash)):
            match = _NAME.fullmatch(entry.name)
            if match is None or checkpoint_key(match[1]) is None or hurry():
                continue
            if entry.is_dir(follow_symlinks=False):
                remove_tree(entry.path)

"""Keeps two runs of this machine from watching the same checkpoints.

Each would set aside, before a start, what the other one's script is writing at that moment. Nothing
is added to the script's files: a claim is a socket without a place in the file system, which ends
with its process.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from elastic_ckpt.errors import LockHeld
from elastic_ckpt.policy.own_saves import is_overwritten


class Claim:
    """What one run has claimed."""

    def __init__(self) -> None:
        self._held: dict[str, socket.socket] = {}

    def take(self, patterns: Iterable[str], base: Path) -> None:
        """Claim what patterns match, once the directory for it is there.

        Raises:
            LockHeld: another run has claimed it.
        """
        for pattern in patterns:
            name = "" if pattern in self._held else _name(base / Path(pattern).expanduser())
            if not name:
                continue
            channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            try:
                channel.bind(name)
            except OSError as error:
                channel.close()
                if error.errno == errno.EADDRINUSE:
                    raise LockHeld(
                        f"another run on this machine watches {pattern} already: stop it, or give "
                        "each run an output of its own"
                    ) from None
            else:
                self._held[pattern] = channel

    def release(self) -> None:
        """Let others have it."""
        for channel in self._held.values():
            channel.close()
        self._held.clear()


def _name(place: Path) -> str:
    """Return the abstract address for a pattern; empty while its directory does not exist.

    By inode, as a path may lead elsewhere in another container.
    """
    fixed = place.parent
    while not is_overwritten(str(fixed)):
        fixed = fixed.parent
    try:
        found = os.stat(fixed)
    except OSError:
        return ""
    rest = blake2b(os.fsencode(place.relative_to(fixed)), digest_size=8)  # an address is short
    where = f"{found.st_dev:x}-{found.st_ino:x}-{rest.hexdigest()}"
    return f"\0elastic-ckpt-{os.geteuid()}-{where}"

"""A disk on which each file of a checkpoint takes three seconds more until it is durable.

Python imports this at its start if it is the first of its name on the path.
"""

import os
import time
from pathlib import Path

SECONDS = 3.0
SMALL_BYTES = 4096

_fsync = os.fsync


def fsync(fd: int) -> None:
    path = Path(f"/proc/self/fd/{fd}").readlink()
    if ".attempts" in path.parts and os.fstat(fd).st_size > SMALL_BYTES:
        time.sleep(SECONDS)
    _fsync(fd)


os.fsync = fsync

"""A second kernel as a process: user-mode Linux, with this host's files as its read-only root.

It brings what many hosts lack, such as the device mapper. Needs root and Debian's packages
``user-mode-linux`` and ``dmsetup``; nothing is installed in it and nothing of it stays.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parents[1]
_MODULES: Final = Path("/usr/lib/uml/modules")
_REGISTERS: Final = Path(__file__).with_name("uml_registers.c")
_WIDE: Final = " amx_tile "
_LEFT: Final = "guest exit code: "

_PLAIN: Final = "glibc.cpu.hwcaps=-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ,-AVX512CD"
"""The guest's kernel saves no more than AVX2 when it switches threads."""


def why_not() -> str:
    """Return why such a guest cannot run here; empty if it can."""
    if os.geteuid() != 0:
        return "user-mode Linux with devices needs root"
    for tool in ("linux.uml", "dmsetup", "unshare", "setpriv"):
        if not shutil.which(tool):
            return f"{tool} is not installed (apt-get install user-mode-linux dmsetup)"
    if _is_wide() and not shutil.which("cc"):
        return "user-mode Linux needs a C compiler here: this processor has AMX"
    return ""


def run(
    directory: Path,
    command: Sequence[str],
    *,
    disks: Iterable[Path],
    modules: Iterable[str] = (),
    seconds: float,
    megabytes: int = 768,
) -> str:
    """Boot a guest, run a command in the repository there, power off, and return the console.

    The disks are ``/dev/ubda``, ``/dev/ubdb`` and so on. Every path of the host can be read; a
    directory can be mounted over.

    Args:
        directory: for the guest's memory, script and sockets; best in memory itself.
        modules: kernel modules to load, in order, such as ``drivers/md/dm-mod``.
        seconds: the guest is killed after that.

    Raises:
        AssertionError: it did not boot, did not end in time, or the command failed.
    """
    init = directory / "init"
    init.write_text("\n".join(_script(command, modules)) + "\n")
    init.chmod(0o700)
    drives = [f"ubd{chr(ord('a') + at)}={disk}" for at, disk in enumerate(disks)]
    guest = [
        "setpriv", "--pdeathsig=KILL",  # with the test's end
        "unshare", "--pid", "--fork", "--kill-child=KILL", "--mount-proc",
        "linux.uml", f"mem={megabytes}M", "root=/dev/root", "rootfstype=hostfs", "rootflags=/",
        "ro", f"init={init}", f"uml_dir={directory}", "con=null", "con0=null,fd:1", *drives,
    ]  # fmt: skip
    variables = {**os.environ, "TMPDIR": str(directory)}  # the guest's memory is a file there
    if _is_wide():
        variables["LD_PRELOAD"] = str(_registers(directory))
    process = subprocess.Popen(
        guest, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=variables, text=True, errors="replace",
    )  # fmt: skip
    try:
        console, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        late = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        raise AssertionError(f"the guest ran for over {seconds:.0f} s:\n{late[-4000:]}") from None
    finally:
        process.kill()
        process.wait(20)
    assert f"{_LEFT}0" in console, f"the guest failed:\n{console[-6000:]}"
    return console


def _script(command: Sequence[str], modules: Iterable[str]) -> list[str]:
    release = next(_MODULES.iterdir()).name
    variables = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONDONTWRITEBYTECODE": "1",
        "GLIBC_TUNABLES": _PLAIN,
    }
    return [
        "#!/bin/bash",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        "mount -t proc proc /proc; mount -t sysfs sys /sys",
        "mount -t tmpfs run /run; mkdir -p /dev/shm; mount -t tmpfs shm /dev/shm",
        *(f"insmod {_MODULES}/{release}/kernel/{module}.ko" for module in modules),
        f"cd {shlex.quote(str(REPOSITORY))}",
        shlex.join(command),
        f'echo "{_LEFT}$?"',
        "echo o > /proc/sysrq-trigger; sleep 60",
    ]


def _is_wide() -> bool:
    """Whether the processor has more registers than a guest's kernel knows to pass on."""
    return _WIDE in Path("/proc/cpuinfo").read_text()


def _registers(directory: Path) -> Path:
    """Compile what lets such a guest run: without it no process of the guest starts."""
    library = directory / "registers.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(_REGISTERS)], check=True
    )
    return library


def python(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]

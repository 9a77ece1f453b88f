"""Completion in real shells: a line, the tab key, and the completed line."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).parent / "elastic-ckpt"
LIMIT_SECONDS = 60.0

SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], ""),
    "zsh": (["zsh", "-f", "-i"], "autoload -U compinit; compinit -u -D; bindkey -e; "),
    "fish": (["fish", "--no-config", "-i"], ""),
}

LINES = {
    "elastic-ckpt sta": "elastic-ckpt status",
    "elastic-ckpt slurm sub": "elastic-ckpt slurm submit",
    "elastic-ckpt completion z": "elastic-ckpt completion zsh",
    "elastic-ckpt run --group": "elastic-ckpt run --group-access",
    "elastic-ckpt verify --qu": "elastic-ckpt verify --quarantine",
    "elastic-ckpt run --on-warning ig": "elastic-ckpt run --on-warning ignore",
    "elastic-ckpt run --notice-source az": "elastic-ckpt run --notice-source azure",
    "elastic-ckpt run --dir checkp": "elastic-ckpt run --dir checkpoints",
    "elastic-ckpt status checkp": "elastic-ckpt status checkpoints",
    "elastic-ckpt verify checkpoints/ep": "elastic-ckpt verify checkpoints/epoch-0_step-4",
    "elastic-ckpt run --dir checkpoints -- tr": "elastic-ckpt run --dir checkpoints -- train.py",
}

Press = Callable[[str], str]


class Shell:
    """An interactive shell on its own terminal."""

    def __init__(self, name: str, home: Path) -> None:
        command, setup = SHELLS[name]
        self._home = home
        script = home / "completion"
        script.write_bytes(
            subprocess.run(
                [PROGRAM, "completion", name], capture_output=True, timeout=60, check=True
            ).stdout
        )
        self._terminal, inside = pty.openpty()
        self._process = subprocess.Popen(
            command,
            stdin=inside, stdout=inside, stderr=inside, cwd=home,
            env={
                "PATH": f"{PROGRAM.parent}:/usr/bin:/bin", "HOME": str(home),
                "XDG_CONFIG_HOME": str(home), "XDG_DATA_HOME": str(home), "TERM": "dumb",
            },
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inside)
        self._type(f"{setup}source {script}; echo ready > ready\n")
        self._wait_for(home / "ready")

    def press_tab(self, line: str) -> str:
        """Return the line after pressing tab."""
        answer = self._home / "answer"
        answer.unlink(missing_ok=True)
        # Control-A and -E go to the start and end of the line, to turn it into an echo command.
        self._type(f'{line}\t\x01echo "\x05" > answer\n')
        return self._wait_for(answer).strip().removesuffix("/")  # zsh removes it

    def close(self) -> None:
        """Kill the shell."""
        self._process.kill()
        self._process.wait(timeout=LIMIT_SECONDS)
        os.close(self._terminal)

    def _type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def _wait_for(self, file: Path) -> str:
        said = b""
        limit = time.monotonic() + LIMIT_SECONDS
        while time.monotonic() < limit:
            if file.exists() and (text := file.read_text()).endswith("\n"):
                return text
            if select.select([self._terminal], [], [], 0.05)[0]:  # or the shell would block
                said += os.read(self._terminal, 65536)
        raise AssertionError(f"no {file.name}; the terminal shows {said[-2000:]!r}")


@pytest.fixture(params=list(SHELLS))
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shell]:
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    (tmp_path / "checkpoints" / "epoch-0_step-4").mkdir(parents=True)
    (tmp_path / "train.py").write_text("")
    opened = Shell(name, tmp_path)
    yield opened
    opened.close()


@pytest.mark.one_torch
def test_a_shell_completes(shell: Shell) -> None:
    """Commands, options, choices and paths."""
    assert {line: shell.press_tab(line) for line in LINES} == LINES


@pytest.mark.one_torch
def test_completion_is_light() -> None:
    """Each press of tab starts a process, which must not import torch or the supervisor."""
    ask = """
import sys
from elastic_ckpt.cli.app import main
try:
    main()
except SystemExit as leaving:
    print(leaving.code, *sys.modules, file=sys.stderr)
"""
    for line in ("elastic-ckpt ", "elastic-ckpt run --", "elastic-ckpt prune --keep"):
        done = subprocess.run(
            [sys.executable, "-c", ask],
            capture_output=True, text=True, timeout=60, check=True,
            env={
                **os.environ,
                "COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")),
                "_ELASTIC_CKPT_COMPLETE": "bash_complete",
            },
        )  # fmt: skip
        code, *modules = done.stderr.split()
        assert code == "0" and len(done.stdout.splitlines()) > 1
        heavy = {"torch", "numpy", "rich", "asyncio", "jinja2", "prometheus_client"}
        assert not heavy & set(modules), line
        assert not any(name.startswith("elastic_ckpt.supervisor") for name in modules), line

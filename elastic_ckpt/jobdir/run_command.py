"""How a run was started, kept so that the command that continues it can be shown."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from elastic_ckpt.jobdir.slurm_jobs import find_job
from elastic_ckpt.notices.slurm import job_id
from elastic_ckpt.util.versions import revision, versions

PROGRAM: Final = "elastic-ckpt"
_MAX_BYTES: Final = 128 * 1024
_MAX_VARIABLES: Final = 1000


class RunCommand(msgspec.Struct, frozen=True):
    """The command of a run.

    Attributes:
        argv: its words; empty if they are too long, or not Unicode.
        directory: its working directory.
        environment: the names of its environment variables, sorted; never their values.
        versions: of this program, Python and packages, by name.
        revision: ``git describe`` of the script's tree; empty if that is not known.
        slurm_job: the number of its SLURM job, or task of an array; empty outside SLURM.
        submit: the command that submitted that job; empty if ``slurm submit`` did not.
    """

    argv: tuple[str, ...]
    directory: str
    environment: tuple[str, ...] = ()
    versions: dict[str, str] = {}
    revision: str = ""
    slurm_job: str = ""
    submit: str = ""

    @classmethod
    def current(cls, arguments: Sequence[str], script: Path | None = None) -> RunCommand:
        """Return the command of this process: ``run`` with these arguments."""
        argv = (*program(), "run", *arguments)
        here, names = os.getcwd(), sorted(os.environ)[:_MAX_VARIABLES]
        fits = sum(map(len, argv)) <= _MAX_BYTES and _is_text([*argv, here])
        return cls(
            argv if fits else (),
            here,
            tuple(filter(_is_text, names)),
            versions(),
            revision(script.parent) if script is not None else "",
            job_id(),
            submission(),
        )

    @property
    def is_managed(self) -> bool:
        """Whether SLURM or systemd started it, which may start it again."""
        return bool({"SLURM_JOB_ID", "INVOCATION_ID"} & set(self.environment))

    def line(self) -> str:
        """Return the command for a POSIX shell, whatever its directory; empty if unknown."""
        words = " ".join(map(quoted, self.argv))
        return f"cd {quoted(self.directory)} && {words}" if words else ""

    def rerun(self) -> str:
        """Return what a person types to run it again; empty if unknown."""
        return self.submit or self.line()


def submission() -> str:
    """Return the command that submitted this process's SLURM job; empty if ``slurm submit`` did
    not."""
    job = find_job(job_id())
    return job.submit if job is not None and _is_text(job.submit) else ""


def program() -> list[str]:
    """Return the words that start this program from a shell."""
    called = Path(sys.argv[0])
    if called.name != PROGRAM:
        return [sys.executable, "-m", "elastic_ckpt"]
    found = shutil.which(PROGRAM)
    on_path = found is not None and Path(found).resolve() == called.resolve()
    return [PROGRAM if on_path else str(called.absolute())]


def command_line(*words: object) -> str:
    """Return a command of this program for a shell."""
    return " ".join(map(quoted, (PROGRAM, *map(str, words))))


def quoted(word: str) -> str:
    """Quote a word for a shell; characters that could steer a terminal are escaped."""
    if word.isprintable():
        return shlex.quote(word)
    data = "".join(
        char if char.isprintable() and char not in "\\'" else _escaped(char) for char in word
    )
    return f"$'{data}'"  # bash, zsh, ksh


def _escaped(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode(errors="surrogateescape"))


def _is_text(words: str | Sequence[str]) -> bool:
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        return False
    return True

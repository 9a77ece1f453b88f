"""What the script imports, noted for the process that the next workers are forked from."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.preload_file import (
    MAX_NAMES,
    Preload,
    is_installed,
    is_module_name,
    read_preload,
    write_preload,
)


@dataclass(frozen=True)
class ImportNotes:
    """Of rank 0; the other ranks import the same.

    Attributes:
        job: where they are kept.
        before: modules that this process was forked with.
        own: directories of the user's own code, which may change between two starts.
    """

    job: JobDirectory
    before: frozenset[str]
    own: tuple[str, ...]

    @classmethod
    def begin(cls, job: JobDirectory, script: str) -> ImportNotes:
        """Call before the script runs."""
        own = (os.path.dirname(os.path.abspath(script)), os.getcwd())
        return cls(job, frozenset(sys.modules), own)

    def write(self) -> None:
        """Keep the installed modules that were imported, if they are not those of the last time.

        Where those were refused, they stay so until the script imports others.
        """
        known = read_preload(self.job).modules
        names = self._imported(frozenset(known))
        if set(names) != set(known):
            write_preload(self.job, Preload(names))

    def _imported(self, known: frozenset[str]) -> tuple[str, ...]:
        names = [
            name
            for name, module in list(sys.modules.items())
            if (name in known or name not in self.before)
            and is_module_name(name)
            and is_installed(_origin(name, module), self.own)
        ]
        return tuple(names[:MAX_NAMES])


def _origin(name: str, module: object) -> str:
    """The file that importing a name reads; empty if there is none, or it is another's name."""
    spec = module.__dict__.get("__spec__") if isinstance(module, ModuleType) else None
    if not isinstance(spec, ModuleSpec) or spec.name != name:
        return ""
    return spec.origin if isinstance(spec.origin, str) else ""

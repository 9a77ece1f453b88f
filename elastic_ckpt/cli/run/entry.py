"""What a run executes: a script, or a module as under ``python -m``. Options end at either."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from elastic_ckpt.errors import UsageError

_FLAG: Final = "-m"
_MODULE: Final = re.compile(r"-m(.+)?|--module(?:=(.*))?", re.DOTALL)
MISSING_SCRIPT: Final = "no script"
NO_SCRIPT: Final = "missing SCRIPT: end the command with train.py ARGS, or with -m MODULE ARGS"


class ScriptPath(click.Path):
    """A path as it was typed, because it may be the module's first argument."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the value."""
        return value


def end_options(arguments: Sequence[str], options: Sequence[click.Parameter]) -> list[str]:
    """Return the arguments of ``run`` with ``--`` before the script's or the module's.

    A module becomes ``--module NAME -- -m``, whether ``-m`` comes after ``--`` or in place of it.
    """
    at = options_end(arguments, options)
    if found := _MODULE.fullmatch(arguments[at]) if at < len(arguments) else None:
        given = [name for name in found.groups() if name is not None]
        return _of_module(arguments[:at], [*given, *arguments[at + 1 :]])
    if list(arguments[at : at + 2]) == ["--", _FLAG]:
        return _of_module(arguments[:at], arguments[at + 2 :])
    return list(arguments)


def options_end(arguments: Sequence[str], options: Sequence[click.Parameter]) -> int:
    """Return how many of the arguments of ``run`` are its own options; the script follows."""
    valued = {flag for one in options if not getattr(one, "is_flag", False) for flag in one.opts}
    at = 0
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] != "--":
        if _MODULE.fullmatch(arguments[at]):
            break
        at += 2 if arguments[at] in valued else 1
    return min(at, len(arguments))


def _of_module(options: Sequence[str], rest: Sequence[str]) -> list[str]:
    if not rest:
        raise UsageError("-m needs a module: -m package.module ARGS")
    return [*options, f"--module={rest[0]}", "--", _FLAG, *rest[1:]]


def choose_entry(ctx: click.Context) -> None:
    """Leave ``script`` or ``module`` in the parameters; the command line's, else the file's.

    Raises:
        UsageError: neither or both are given.
    """
    params = ctx.params
    if params["script"] == _FLAG:
        params["script"] = None
    if params["script"] is not None and params["module"] is not None:
        if ctx.get_parameter_source("script") is ParameterSource.COMMANDLINE:
            params["module"] = None
        elif ctx.get_parameter_source("module") is ParameterSource.COMMANDLINE:
            params["script"] = None
        else:
            raise UsageError("script and module are both given: choose one")
    if params["script"] is None and params["module"] is None:
        raise UsageError(NO_SCRIPT)


def words(params: Mapping[str, Any]) -> list[str]:
    """Return what ends the command line: the script or the module, and its arguments."""
    module = params["module"]
    return [*([_FLAG, module] if module is not None else [params["script"]]), *params["args"]]


def find_file(script: str | None, module: str | None, python: str = "") -> Path:
    """Return the file that is executed; a module as ``python`` finds it, if that is not this one.

    Raises:
        UsageError: it does not exist or cannot be read.
    """
    if module is not None and python:
        from elastic_ckpt.cli.run.interpreter import module_file

        return module_file(python, module)
    path = _module_file(module) if module is not None else Path(script or "")
    if module is None and not path.is_file():
        raise UsageError(f"{MISSING_SCRIPT} {path}: correct its path")
    if path.is_file() and not os.access(path, os.R_OK):
        raise UsageError(f"cannot read {path}: fix its permissions")
    return path


def _module_file(name: str) -> Path:
    """Find a module as ``python -m`` does, but import nothing."""
    parts = name.split(".")
    found: ModuleSpec | None = None
    if all(part.isidentifier() for part in parts):
        found = PathFinder.find_spec(parts[0], [str(Path.cwd())]) or find_spec(parts[0])
        for part in (*parts[1:], None):
            if found is not None and found.submodule_search_locations is not None:
                # By the last part of its name: its package is not imported.
                places = list(found.submodule_search_locations)
                found = PathFinder.find_spec(part or "__main__", places)
            elif part is not None:
                found = None
    if found is None or found.origin is None:
        raise UsageError(f"no module {name} in {Path.cwd()} or among the installed packages")
    return Path(found.origin)

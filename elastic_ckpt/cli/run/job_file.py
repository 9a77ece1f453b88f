"""The job file: every option of ``run`` as a typed key; flags and environment override it.

Its table ``[env]`` has variables for the workers; see ``worker_variables.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from click.core import ParameterSource

from elastic_ckpt.checkpoint.bucket.url import is_url
from elastic_ckpt.cli.common import Duration, Size
from elastic_ckpt.cli.run.entry import MISSING_SCRIPT
from elastic_ckpt.cli.run.hostfile import FROM_HOSTFILE
from elastic_ckpt.cli.run.worker_variables import ENV, VARIABLES, worker_variables
from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.text import printable

_PATHS: Final = frozenset(
    {
        "dir",
        "local-dir",
        "script",
        "python",
        "memory-dir",
        "metrics-file",
        "notice-file",
        "hostfile",
    }
)
_TEXTS: Final = frozenset({"watch", "resume-args"})
_TEXT: Final = "a string or an integer"  # 2, "auto", "90s"
_NOT_KEYS: Final = frozenset({"config", "print-config", "help"})
_BATCH: Final = "elastic_ckpt.batch_keys"
_PATH: Final = "elastic_ckpt.job_file"
_SOURCES: Final = {
    ParameterSource.COMMANDLINE: "flag",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
    ParameterSource.DEFAULT: "default",
}


@dataclass(frozen=True)
class BatchKeys:
    """The keys for the batch script of ``slurm submit``, which ``run`` checks and leaves alone.

    Attributes:
        setup: lines of shell, before the supervisors start.
        srun: further options of srun, each one word.
        python: ``supervisor-python``: shell words that start the supervisor's Python on the nodes;
            empty for the interpreter of submit.
    """

    setup: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    python: str = ""


def format_options(ctx: click.Context) -> str:
    """Return the options as a job file, each with its source in a comment."""
    lines = []
    for key, parameter in option_keys(ctx.command).items():
        name = parameter.name or ""
        source = _SOURCES.get(ctx.get_parameter_source(name) or ParameterSource.DEFAULT, "default")
        if name in ctx.meta.get(FROM_HOSTFILE, ()):
            source = "hostfile"
        value = ctx.params.get(name)
        if key == "resume-args":
            value = _words(value or ())
        text = f"{key} = {_toml(value)}" if value is not None else f"# {key} is not set"
        lines.append(_with_source(text, source))
    for key, value in ctx.meta.get(_BATCH, {}).items():
        lines.append(_with_source(f"{key} = {_toml(value)}", "file, for slurm submit"))
    return "\n".join([*lines, *_format_variables(ctx.meta.get(VARIABLES, {}))])


def _format_variables(variables: Mapping[str, str]) -> Iterator[str]:
    """Yield the table of variables, which a TOML file has at its end."""
    yield "[env]" if variables else _with_source("# [env] is not set", "default")
    for name, value in variables.items():
        hides = os.environ.get(name, value) != value
        source = "file, in place of the environment's" if hides else "file"
        yield _with_source(f"{name} = {_toml(value)}", source)


def _with_source(text: str, source: str) -> str:
    return f"{text:<48}  # {source}"


def _words(texts: Sequence[str]) -> Sequence[str]:
    """Return the words of texts as a job file has them; unchanged if a quote is open."""
    try:
        return [word for text in texts for word in shlex.split(text)]
    except ValueError:
        return texts


def read_job_file(ctx: click.Context, path: Path) -> None:
    """Take over a job file: its keys as defaults of the options, and its variables.

    Raises:
        UsageError: it cannot be read, or a key, a value or a variable is invalid.
    """
    data = _decode(path)
    ctx.meta[_PATH] = path
    keys = option_keys(ctx.command)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key == ENV:
            with _named(path):
                ctx.meta[VARIABLES] = worker_variables(value)
            continue
        if key in BATCH_KEYS:
            _check_type(path, key, BATCH_KEYS[key], value)
            ctx.meta.setdefault(_BATCH, {})[key] = value
            continue
        if key not in keys:
            raise UsageError(f"--config {path}: {_unknown(path, key, [*keys, *BATCH_KEYS, ENV])}")
        parameter = keys[key]
        values[parameter.name or ""] = _typed(path, key, parameter, value)
    ctx.default_map = values


@contextlib.contextmanager
def job_file_named(ctx: click.Context) -> Iterator[None]:
    """Let errors in a value of the job file name the file and the key."""
    try:
        yield
    except (UsageError, click.BadParameter) as error:
        text = error.format_message() if isinstance(error, click.BadParameter) else str(error)
        given = [
            key
            for key, parameter in option_keys(ctx.command).items()
            if ctx.get_parameter_source(parameter.name or "") is ParameterSource.DEFAULT_MAP
        ]
        found = re.sub(r"--([a-z][a-z-]*)", lambda one: one[one[1] in given], text)
        is_known = found != text or ("script" in given and text.startswith(MISSING_SCRIPT))
        if text.startswith("--config ") or not is_known:
            raise
        raise UsageError(f"--config {ctx.meta.get(_PATH)}: {found}") from None


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Let errors name the file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from None


def _decode(path: Path) -> dict[str, Any]:
    import msgspec

    try:
        found: dict[str, Any] = msgspec.toml.decode(path.read_bytes())
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror or error}") from None
    except (msgspec.MsgspecError, ValueError) as error:
        raise UsageError(f"--config {path} is not valid TOML: {printable(str(error))}") from None
    return found


def read_batch_keys(path: Path) -> BatchKeys:
    """Return a job file's keys for the batch script.

    Raises:
        UsageError: the file cannot be read, or one of these keys is invalid.
    """
    data = _decode(path)
    for key in BATCH_KEYS.keys() & data.keys():
        _check_type(path, key, BATCH_KEYS[key], data[key])
    setup = data.get("setup", [])
    lines = setup.splitlines() if isinstance(setup, str) else setup
    return BatchKeys(
        tuple(lines), tuple(data.get("srun", [])), data.get("supervisor-python", "").strip()
    )


def option_keys(command: click.Command) -> dict[str, click.Parameter]:
    """Return parameters by key: a long flag without its dashes, or an argument's name."""
    found: dict[str, click.Parameter] = {}
    for parameter in command.params:
        flags = [flag for flag in parameter.opts if flag.startswith("--")]
        key = flags[0][2:] if flags else (parameter.name or "")
        if key not in _NOT_KEYS:
            found[key] = parameter
    return found


def _typed(path: Path, key: str, parameter: click.Parameter, value: Any) -> Any:
    """Return a value as the command line would give it.

    Raises:
        UsageError: the value has the wrong type.
    """
    wanted = _check_type(path, key, key_type(key, parameter), value)
    if key in _TEXTS:
        if isinstance(value, str):
            return [value]  # resume-args: split into words, as on a command line
        return [shlex.quote(text) for text in value] if key == "resume-args" else value
    if key == "args":
        return [str(one) for one in value]
    by_name = key == "python" and "/" not in value  # to be looked for on PATH
    if key in _PATHS and value != "off" and not is_url(value) and not by_name:
        return str(path.absolute().parent / value)  # relative to the file
    return str(value) if wanted == _TEXT else value


def _check_type(path: Path, key: str, kind: KeyType, value: Any) -> str:
    """Return the description of the type; UsageError if the value does not have it."""
    wanted, fits = kind
    if not fits(value):
        raise UsageError(f"--config {path}: {key} must be {wanted}, not {value!r:.80}")
    return wanted


def key_type(key: str, parameter: click.Parameter) -> KeyType:
    """Return the type of a key, as a description and as a check."""
    if key in _TEXTS:
        return _SEVERAL_TEXTS
    if key == "args":
        return "a list of strings and numbers", _is_words
    if parameter.nargs == -1 or getattr(parameter, "multiple", False):
        return "a list of strings", _is_texts
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return "true or false", lambda value: isinstance(value, bool)
    if isinstance(parameter.type, click.IntRange):
        return "an integer", lambda value: _is_number(value, int)
    if isinstance(parameter.type, Duration):
        return (
            "a number of seconds, or a duration like 90s or 2m",
            lambda value: isinstance(value, str) or _is_number(value, int | float),
        )
    if isinstance(parameter.type, Size):
        return (
            "a number of bytes, or a size like 50MB",
            lambda value: isinstance(value, str) or _is_number(value, int | float),
        )
    if key in _PATHS:
        return "a path", lambda value: isinstance(value, str)
    return _TEXT, lambda value: isinstance(value, str) or _is_number(value, int)


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, str) or _is_number(one, int | float) for one in value
    )


KeyType = tuple[str, Callable[[Any], bool]]

_SEVERAL_TEXTS: Final[KeyType] = (
    "a string or a list of strings",
    lambda value: isinstance(value, str) or _is_texts(value),
)

BATCH_KEYS: Final[Mapping[str, KeyType]] = {
    "setup": _SEVERAL_TEXTS,
    "srun": ("a list of strings", _is_texts),
    "supervisor-python": ("a string", lambda value: isinstance(value, str)),
}
"""The keys of :class:`BatchKeys`, with their types."""


def _unknown(path: Path, key: str, keys: list[str]) -> str:
    import difflib

    from elastic_ckpt.cli.slurm.sbatch_options import is_option

    close = difflib.get_close_matches(key.replace("_", "-"), keys, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; the keys are {', '.join(keys)}"
    if is_option(name := key.replace("_", "-")) and not close:
        submit = f"elastic-ckpt slurm submit {path.name} -- --{name}=..."
        hint = f", an option of sbatch, which follows --: {submit}"
    return f"unknown key {printable(key, 80)!r}{hint}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, tuple | list):
        return json.dumps([str(item) for item in value])
    return json.dumps(str(value))  # a TOML basic string has JSON's syntax

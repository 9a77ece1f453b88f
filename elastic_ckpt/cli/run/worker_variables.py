"""The job file's table ``[env]``: environment variables for the workers."""

from __future__ import annotations

import re
from typing import Any, Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.text import printable

ENV: Final = "env"
"""The name of the table, and of the parameter of ``run`` that has it."""

VARIABLES: Final = "elastic_ckpt.variables"
"""The key of click's ``meta`` that has the table."""

_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

_SET_BY_RUN: Final = re.compile(
    r"ELASTIC_CKPT_\w*|TORCHELASTIC_\w+|MASTER_(?:ADDR|PORT)|SLURM_(?:PROCID|LOCALID|NPROCS|NTASKS)"
    r"|(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|ROLE_NAME"
)
"""What a run sets for each worker; a worker with another value would be another rank."""


def worker_variables(table: Any) -> dict[str, str]:
    """Return the variables of a table, with numbers as text.

    Raises:
        UsageError: a name or a value cannot be one of a variable, or ``run`` sets it.
    """
    if not isinstance(table, dict):
        raise UsageError(f'{ENV} must be a table of variables: [env], then NAME = "value"')
    return {name: _value(name, value) for name, value in table.items()}


def _value(name: str, value: Any) -> str:
    shown = f"[env] {printable(name, 80)}"
    if not _NAME.fullmatch(name):
        raise UsageError(f"{shown}: not a valid name: use letters, digits and _")
    if _SET_BY_RUN.fullmatch(name):
        raise UsageError(f"{shown}: run sets this variable for the workers: leave it out")
    if isinstance(value, bool):
        # Programs disagree about the text: 1, true, True, yes, on.
        raise UsageError(f'{shown} must be a string or a number: write "1" or "true"')
    if not isinstance(value, str | int | float):
        raise UsageError(f"{shown} must be a string or a number, not {value!r:.80}")
    if "\0" in str(value):
        raise UsageError(f"{shown}: a value cannot contain a NUL byte")
    return str(value)

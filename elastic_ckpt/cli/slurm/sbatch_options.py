"""The options of sbatch, read from the command line and from ``SBATCH_*`` variables.

They become ``#SBATCH`` lines, so that the script alone says what the job requests. Names are those
of SLURM 22.05 and newer; an unknown one is passed on, for plug-ins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.run_command import program, quoted
from elastic_ckpt.util.text import printable

_SHORT: Final[Mapping[str, str]] = {
    "A": "account", "B": "extra-node-info", "C": "constraint", "D": "chdir", "F": "nodefile",
    "G": "gpus", "H": "hold", "J": "job-name", "L": "licenses", "M": "clusters", "N": "nodes",
    "O": "overcommit", "Q": "quiet", "S": "core-spec", "V": "version", "W": "wait", "a": "array",
    "b": "begin", "c": "cpus-per-task", "d": "dependency", "e": "error", "h": "help",
    "i": "input", "k": "no-kill", "m": "distribution", "n": "ntasks", "o": "output",
    "p": "partition", "q": "qos", "s": "oversubscribe", "t": "time", "v": "verbose",
    "w": "nodelist", "x": "exclude",
}  # fmt: skip

_FLAG_NAMES: Final = """
contiguous help hold ignore-pbs no-requeue overcommit parsable quiet reboot requeue spread-job
test-only usage use-min-nodes verbose version wait
"""
_OPTIONAL_NAMES: Final = "exclusive get-user-env nice no-kill oversubscribe propagate"
_VALUED_NAMES: Final = """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint
container container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline
delay-boot dependency distribution error exclude export export-file extra extra-node-info gid
gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint input
job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu
mem-per-gpu mincpus network nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu
ntasks-per-node ntasks-per-socket open-mode output partition power prefer priority profile qos
reservation segment signal sockets-per-node switches thread-spec threads-per-core time time-min tmp
tres-bind tres-per-task uid wait-all-nodes wckey wrap
"""
_FLAGS: Final = frozenset(_FLAG_NAMES.split())
_OPTIONAL: Final = frozenset(_OPTIONAL_NAMES.split())  # a value only after =
_VALUED: Final = frozenset(_VALUED_NAMES.split())
_KNOWN: Final = _FLAGS | _OPTIONAL | _VALUED

_OF_THE_COMMAND: Final = frozenset({"parsable", "quiet", "verbose", "test-only"})
"""They concern the submission, not the job."""

_VARIABLE_NAMES: Final = """
ACCOUNT ACCTG_FREQ ARRAY_INX BATCH BURST_BUFFER CLUSTERS CLUSTER_CONSTRAINT CONSTRAINT CONTAINER
CONTAINER_ID CORE_SPEC CPUS_PER_GPU CPU_FREQ_REQ DELAY_BOOT DISTRIBUTION ERROR EXCLUSIVE EXPORT
GET_USER_ENV GPUS GPUS_PER_NODE GPUS_PER_SOCKET GPUS_PER_TASK GPU_BIND GPU_FREQ GRES GRES_FLAGS HINT
IGNORE_PBS INPUT JOB_NAME MEM_PER_CPU MEM_PER_GPU MEM_PER_NODE NETWORK NO_KILL NO_REQUEUE OPEN_MODE
OUTPUT OVERCOMMIT PARTITION POWER PROFILE QOS REQUEUE REQ_SWITCH RESERVATION SIGNAL SPREAD_JOB
THREADS_PER_CORE THREAD_SPEC TIMELIMIT TRES_BIND TRES_PER_TASK USE_MIN_NODES WAIT_ALL_NODES WCKEY
"""
"""Those of ``SBATCH_*`` that become lines. MEM_BIND is left out, which SLURM itself sets in a job,
and DEBUG and WAIT, which concern the submission."""
_RENAMED: Final[Mapping[str, str]] = {
    "ARRAY_INX": "array",
    "BURST_BUFFER": "bb",
    "CPU_FREQ_REQ": "cpu-freq",
    "MEM_PER_NODE": "mem",
    "REQ_SWITCH": "switches",
    "TIMELIMIT": "time",
}
_VARIABLES: Final[Mapping[str, str]] = {
    f"SBATCH_{name}": _RENAMED.get(name, name.lower().replace("_", "-"))
    for name in _VARIABLE_NAMES.split()
}

_SLURM_READS: Final = frozenset(
    ("SLURM_CLUSTERS", "SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_DEBUG_FLAGS", "SLURM_JWT",
     "SLURM_UMASK")
)  # fmt: skip
_NOT_PASSED: Final = frozenset({*_VARIABLES, "SBATCH_WAIT"})
_MAX_LINE: Final = 4096  # sbatch has room for 8 KiB


@dataclass(frozen=True)
class SbatchOption:
    """One option of sbatch.

    Attributes:
        name: the long name, without dashes.
        value: None for an option without one.
        source: the variable that it comes from; empty for the command line.
    """

    name: str
    value: str | None = None
    source: str = ""

    @property
    def shown(self) -> str:
        """The option as one word."""
        return f"--{self.name}" if self.value is None else f"--{self.name}={self.value}"

    @property
    def line(self) -> str:
        """The option as a line of a batch script.

        Raises:
            UsageError: sbatch could not read it there.
        """
        value = "" if self.value is None else f"={_quoted(self.value)}"
        note = f"  # {self.source}" if self.source else ""
        if not (self.value or "").isprintable() or len(value) > _MAX_LINE:
            raise UsageError(
                f"{printable(self.shown, 80)} does not fit an #SBATCH line: use printable "
                f"characters, at most {_MAX_LINE}"
            )
        return f"#SBATCH --{self.name}{value}{note}"


def read_options(words: Sequence[str]) -> list[SbatchOption]:
    """Return the options on sbatch's command line.

    Raises:
        UsageError: a word is not an option, or a value is missing.
    """
    found: list[SbatchOption] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == ":":
            raise UsageError(
                "heterogeneous jobs (':') are not supported, because each part is a job of its "
                "own: request one job of several nodes; each node starts a worker per GPU it has"
            )
        if not word.startswith("-") or word in ("-", "--"):
            raise UsageError(
                f"unexpected {printable(word, 80)!r}: only options of sbatch follow --; arguments "
                "of the script are args in the job file"
            )
        if word.startswith("--"):
            found.append(_read_long(word[2:], rest))
        else:
            found += _read_short(word[1:], rest)
    return found


def _read_long(text: str, rest: list[str]) -> SbatchOption:
    given, equals, value = text.partition("=")
    name = _whole_name(given)
    if equals:
        return SbatchOption(name, value)
    if name in _FLAGS | _OPTIONAL:
        return SbatchOption(name)
    if name in _VALUED or (rest and not rest[0].startswith("-")):
        return SbatchOption(name, _next_value(name, rest))
    return SbatchOption(name)


def _read_short(letters: str, rest: list[str]) -> Iterable[SbatchOption]:
    """Read ``-Hvp low``: flags, and at the end one with a value."""
    while letters:
        letter, letters = letters[0], letters[1:]
        if letter not in _SHORT:
            raise UsageError(f"unknown option -{printable(letter)} of sbatch: see sbatch --help")
        name = _SHORT[letter]
        if name in _FLAGS:
            yield SbatchOption(name)
            continue
        if name in _VALUED:
            yield SbatchOption(name, letters or _next_value(name, rest))
        else:
            yield SbatchOption(name, letters or None)
        return


def is_option(name: str) -> bool:
    """Whether sbatch has an option of this long name, as far as is known here."""
    return name in _KNOWN


def _next_value(name: str, rest: list[str]) -> str:
    if not rest:
        raise UsageError(f"--{name} of sbatch needs a value")
    return rest.pop(0)


def _whole_name(given: str) -> str:
    """Complete an abbreviation, as sbatch does; an unknown or ambiguous name stays."""
    close = [name for name in _KNOWN if name.startswith(given)]
    return close[0] if given and given not in _KNOWN and len(close) == 1 else given


def options_of_environment(environ: Mapping[str, str]) -> list[SbatchOption]:
    """Return the options that sbatch would take from ``SBATCH_*`` variables."""
    found = []
    for variable, value in sorted(environ.items()):
        name = _VARIABLES.get(variable)
        if name is None:
            continue
        if name not in _FLAGS:
            optional = name in _OPTIONAL and not value
            found.append(SbatchOption(name, None if optional else value, variable))
        elif value in ("", "yes") or (value.isdecimal() and int(value) > 0):
            found.append(SbatchOption(name, None, variable))
    return found


def environment_for_sbatch(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without the variables that have become lines.

    In a job it is also without those that describe that job: a job that inherits, for example,
    SLURM_ARRAY_TASK_ID would take itself for a task of that array.
    """
    is_in_job = "SLURM_JOB_ID" in environ
    return {
        name: value
        for name, value in environ.items()
        if name not in _NOT_PASSED
        and not (is_in_job and name.startswith("SLURM") and name not in _SLURM_READS)
    }


def split_options(
    options: Iterable[SbatchOption],
) -> tuple[list[SbatchOption], list[SbatchOption]]:
    """Return the options of the job, and those of the submission alone."""
    job: list[SbatchOption] = []
    command: list[SbatchOption] = []
    for option in options:
        (command if option.name in _OF_THE_COMMAND else job).append(option)
    return job, command


def submit_line(job_file: Path, options: Iterable[SbatchOption]) -> str:
    """Return the command that submits a job file with these options, for a shell."""
    shown = [option.shown for option in options]
    words = [*program(), "slurm", "submit", str(job_file.absolute()), *["--"] * bool(shown), *shown]
    return f"cd {quoted(os.getcwd())} && {' '.join(map(quoted, words))}"


def value_of(options: Iterable[SbatchOption], name: str) -> str | None:
    """Return the value that counts, which is the last one; None if the option is not given."""
    values = [option.value or "" for option in options if option.name == name]
    return values[-1] if values else None


def _quoted(value: str) -> str:
    """Quote for sbatch, which reads backslashes in both kinds of quotes, and # as a comment."""
    if value and not set(value) & set(" \t\"'\\#"):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'

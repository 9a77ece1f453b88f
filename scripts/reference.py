"""Write docs/reference.md, and the diagram of states in docs/design.md, from the sources.

    python scripts/reference.py

Neither torch nor ColossalAI is imported: signatures and docstrings are read from the sources. A
test compares the files with the output.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[1]))

from python_reference import python

from elastic_ckpt import errors
from elastic_ckpt.cli.app import SECTIONS, group
from elastic_ckpt.cli.run.job_file import BATCH_KEYS, key_type, option_keys
from elastic_ckpt.cli.run.options import GroupedOption, grouped
from elastic_ckpt.errors import ElasticCkptError, ExitCode
from elastic_ckpt.protocol.run_state import TERMINAL, TRANSITIONS, RunState

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference.md"
DESIGN = ROOT / "docs" / "design.md"
BEGIN = "<!-- states: begin -->"
END = "<!-- states: end -->"

HEAD = """\
# Reference

Every command, option, exit code, variable, key and Python name. `python scripts/reference.py`
generates this page from the sources; the [other pages](README.md) explain how to use them.

[Commands](#commands), [exit codes](#exit-codes), [environment variables](#environment-variables),
[the job file](#the-job-file), [Python](#python), [errors](#errors).
"""

CODES = {
    ExitCode.FINISHED: ("training finished", "success"),
    ExitCode.USAGE: ("wrong usage", "wrong usage, or the job is not running"),
    ExitCode.DATA: (
        "checkpoints exist but none can be used, or the data does not match",
        "a checkpoint fails verification",
    ),
    ExitCode.FAILED: (
        "failure budget spent, or a failure that a retry cannot fix",
        "the command failed; the message gives the reason",
    ),
    ExitCode.UNAVAILABLE: (
        "the directory is locked or unusable",
        "the directory is unusable",
    ),
    ExitCode.PREEMPTED_SAVED: ("preempted, with a sealed checkpoint: rerun the same command", ""),
    ExitCode.PREEMPTED_UNSAVED: ("preempted without a new one: rerun the same command", ""),
}

YOURS = {
    "ELASTIC_CKPT_DIR": "the job directory if DIR, `--dir` or a script's `save_dir` is not given; "
    "set for workers",
    "CUDA_VISIBLE_DEVICES": "`--nproc auto` counts the listed devices",
    "SLURMD_NODENAME": "this node's name without `--node-name`",
    "XDG_STATE_HOME": "where SLURM job numbers are recorded, in `elastic-ckpt/slurm`; "
    "default `~/.local/state`",
    "PYTHONPATH": "`slurm submit` writes it into the script if elastic_ckpt was found through it; "
    "and `SBATCH_*`, options of sbatch, as lines",
    "XDG_CONFIG_HOME": "where `systemd install --user` puts the unit, and its job files lie, in "
    "`elastic-ckpt`; default `~/.config`",
    "PATH": "where `--python NAME` looks for a name without a slash",
    "XDG_CACHE_HOME": "where `--dir URL` works, and where the time of the last import of torch is "
    "kept, in `elastic-ckpt`; default `~/.cache`",
    "AWS_ENDPOINT_URL_S3": "or `AWS_ENDPOINT_URL`: the server of `s3://` if it is not AWS",
    "AWS_EC2_METADATA_SERVICE_ENDPOINT": "base URL of the metadata service for `aws`",
    "AZURE_METADATA_SERVICE_ENDPOINT": "the same for `azure`",
    "GCE_METADATA_HOST": "HOST[:PORT], the same for `gcp`",
    "TMPDIR": "directory of the run's sockets and FIFOs; `/tmp` if not set or too long",
    "NO_COLOR": "disables colors; `FORCE_COLOR` enables them without a terminal",
    "COLUMNS": "the output width if the terminal does not report one",
}

THEIRS = {
    "SLURM_JOB_ID": "set by SLURM in a job, with `SLURM_ARRAY_JOB_ID`, `SLURM_ARRAY_TASK_ID`, "
    "`SLURM_JOB_PARTITION`, `SLURM_JOB_NODELIST`, `SLURM_STEP_NODELIST`, `SLURM_STEP_NUM_NODES`, "
    "`SLURM_STEP_TASKS_PER_NODE`, `SLURM_TOPOLOGY_ADDR`, "
    "`SLURM_JOB_NUM_NODES` and `SLURM_RESTART_COUNT`",
    "KUBERNETES_SERVICE_HOST": "set by Kubernetes in a pod: `run` waits for the name of "
    "`--rdzv-endpoint`, which has no address before its pod has one",
    "NOTIFY_SOCKET": "set by systemd: the socket for the supervisor's state, with `WATCHDOG_USEC`",
    "JOURNAL_STREAM": "set by systemd: lines have priorities if standard error is this stream",
}

WORKERS = {
    "ELASTIC_CKPT_REPLAY": "set by `replay`: the script trains again what it has trained before",
    "RANK": "and `LOCAL_RANK`, `WORLD_SIZE`, `LOCAL_WORLD_SIZE`, `GROUP_RANK`, `MASTER_ADDR`, "
    "`MASTER_PORT`: as under torchrun",
    "TORCHELASTIC_RUN_ID": "the job's name and the incarnation; `TORCHELASTIC_RESTART_COUNT` the "
    "number of earlier launches, `TORCHELASTIC_MAX_RESTARTS` always 0",
    "SLURM_PROCID": "and `SLURM_LOCALID`, `SLURM_NPROCS`, `SLURM_NTASKS`: set for the rank, "
    "in SLURM and elsewhere",
    "OMP_NUM_THREADS": "1 unless set, with several workers on a node, as under torchrun",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "set while ColossalAI loads: nothing else is unpickled",
    "TORCH_CPP_LOG_LEVEL": "`ERROR` unless set: torch's store warns about each lost node",
}

BATCH_TEXTS = {
    "setup": "lines of shell that the batch script runs before it starts the supervisors",
    "srun": "further options of srun, each one word: `--container-image=...`",
    "supervisor-python": "shell words that start Python on the nodes, as in a container; a "
    "relative path is seen from the file; the interpreter of `submit` if not given",
}


def main() -> None:
    """Write both files."""
    REFERENCE.write_text(reference(), encoding="utf-8")
    page = DESIGN.read_text(encoding="utf-8")
    DESIGN.write_text(with_states(page), encoding="utf-8")


def reference() -> str:
    """Return the page."""
    parts = [HEAD, *commands(), *exit_codes(), *variables(), *job_file(), *python(), *error_tree()]
    return "\n".join(part.rstrip() + "\n" for part in parts)


# -- commands -----------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    """Yield a section per command, in the order of ``elastic-ckpt --help``."""
    yield "## Commands"
    with click.Context(group, info_name="elastic-ckpt") as context:
        for title, section in SECTIONS.items():
            yield f"**{title}**: " + ", ".join(
                f"[{name}](#elastic-ckpt-{name})" for name in section
            )
        for section in SECTIONS.values():
            for name in section:
                found = group.get_command(context, name)
                assert found is not None
                yield from command(found, f"elastic-ckpt {name}", "###")


def command(found: click.Command, name: str, level: str) -> Iterator[str]:
    """Yield usage, help and options of a command, then its subcommands."""
    yield f"{level} {name}"
    with click.Context(found, info_name=name) as context:
        yield f"```\n{context.get_usage().removeprefix('Usage: ')}\n```"
        yield from paragraphs(found.help or "")
        options = [one for one in found.params if isinstance(one, click.Option)]
        is_grouped = any(isinstance(one, GroupedOption) for one in options)
        for title, group in grouped(options).items() if is_grouped else [("", options)]:
            if title:
                yield f"**{title}**"
            if group:
                rows = [option(one, context) for one in group]
                yield table(("option", "default", "meaning"), rows)
        if isinstance(found, click.Group):
            for sub in found.list_commands(context):
                below = found.get_command(context, sub)
                assert below is not None
                yield from command(below, f"{name} {sub}", level + "#")


def paragraphs(text: str) -> Iterator[str]:
    """Yield a help text as Markdown; a part that click does not wrap becomes a code block."""
    for part in inspect.cleandoc(text).split("\n\n"):
        if part.startswith("\b"):
            lines = part.splitlines()[1:]
            margin = min(len(line) - len(line.lstrip()) for line in lines)
            yield "```\n" + "\n".join(line[margin:] for line in lines) + "\n```"
        else:
            yield " ".join(part.split())


def option(found: click.Option, context: click.Context) -> tuple[str, str, str]:
    """Return the row of an option: its syntax, default and meaning."""
    record = found.get_help_record(context)
    assert record is not None
    written, text = record
    meaning, _, notes = text.partition("  [")
    default = ""
    for note in re.split(r"; |\]\s*\[", notes.rstrip("]")):
        if note.startswith("default: "):
            default = note.removeprefix("default: ")
        elif note == "required":
            default = "required"
        elif note:
            meaning += f" Minimum {note[3:]}." if note.startswith("x>=") else f" ({note})"
    return f"`{written}`", default, meaning


# -- exit codes, variables, the job file ----------------------------------------------------------


def exit_codes() -> Iterator[str]:
    """Yield the exit codes of ``run`` and of the other commands."""
    yield "## Exit codes"
    rows = [(str(int(code)), of_run, of_rest) for code, (of_run, of_rest) in CODES.items()]
    yield table(("code", "of `run`", "of the other commands"), rows)
    yield (
        "`status` exits with 0 running well or finished, 1 degraded or waiting for a rerun, 2 "
        "dead; `drill` with 1 if the save does not fit; `doctor` with 1 if there is a problem; "
        "`verify` with 65 also if there is no checkpoint; all commands with 130 on Ctrl-C. A "
        "script that is told to leave without a supervisor exits with 75 or 76, as `run` does."
    )


def variables() -> Iterator[str]:
    """Yield the variables that are read, and those set for workers."""
    yield "## Environment variables"
    yield "Precedence: flag, environment, job file, default."
    yield table(("you may set", "meaning"), [(f"`{name}`", text) for name, text in YOURS.items()])
    yield table(
        ("set by others", "meaning"), [(f"`{name}`", text) for name, text in THEIRS.items()]
    )
    yield table(
        ("set for workers", "meaning"), [(f"`{name}`", text) for name, text in WORKERS.items()]
    )


def job_file() -> Iterator[str]:
    """Yield the keys: each option of ``run``."""
    yield "## The job file"
    yield (
        "TOML, for `elastic-ckpt run --config JOB.toml` and `elastic-ckpt slurm submit JOB.toml`. "
        "Each option of [run](#elastic-ckpt-run) is a key without its dashes; paths are "
        "relative to the file, but `watch` and `finished-when` to the directory that the run "
        "starts in, as for the script. `--print-config` prints every value and its source."
    )
    yield (
        '```toml\ndir = "checkpoints"\nscript = "train.py"\nargs = ["--epochs", 3]\nnproc = 8\n'
        'grace = "2m"\nsave-interval = "auto"\nkeep-last = 3\n\n[env]\n'
        'NCCL_SOCKET_IFNAME = "eth1"\nOMP_NUM_THREADS = 4\n```'
    )
    yield (
        "`[env]`, at the end of the file, has environment variables for the workers, and for "
        "nothing else: a string, or a number, which becomes its text. `true` and `false` are "
        "refused, because programs disagree about their text. A variable of this table goes "
        "before one of the same name in the environment, and its value is in no file of the job. "
        "Those that `run` sets for each worker are refused: `ELASTIC_CKPT_` and `TORCHELASTIC_` "
        "names, `RANK`, `WORLD_SIZE` and their like, `MASTER_ADDR`, `MASTER_PORT`, and "
        "`SLURM_PROCID`, `SLURM_LOCALID`, `SLURM_NPROCS`, `SLURM_NTASKS`."
    )
    yield (
        "Durations are written `45`, `90s`, `10m`, `6h30m` or `2d`, sizes `300000`, `50MB`, "
        "`1.5GB` (powers of 1000) or `64MiB` (of 1024), here and for every option."
    )
    with click.Context(group, info_name="elastic-ckpt") as context:
        run = group.get_command(context, "run")
        assert run is not None
        rows = [(f"`{key}`", key_type(key, one)[0]) for key, one in option_keys(run).items()]
    yield table(("key", "type"), rows)
    yield (
        "For the batch script that `slurm submit` writes; `run` checks their types and does "
        "nothing with them ([SLURM](slurm.md#setup))."
    )
    yield table(
        ("key", "type", "meaning"),
        [(f"`{key}`", kind, BATCH_TEXTS[key]) for key, (kind, _) in BATCH_KEYS.items()],
    )


# -- errors, and the states of a run ---------------------------------------------------------------


def error_tree() -> Iterator[str]:
    """Yield each error class with its exit code."""
    yield "## Errors"
    yield (
        "All are in `elastic_ckpt.errors`. A worker of `run` that does not catch one exits with "
        "its exit code, and so does the command line; a script without a supervisor exits with "
        "Python's 1."
    )
    rows = []
    for name, found in vars(errors).items():
        if isinstance(found, type) and issubclass(found, ElasticCkptError):
            base = "" if found is ElasticCkptError else f"`{found.__bases__[0].__name__}`"
            first = inspect.getdoc(found).partition("\n\n")[0]  # type: ignore[union-attr]
            rows.append((f"`{name}`", base, str(int(found.exit_code)), " ".join(first.split())))
    yield table(("error", "is a", "code", "when"), rows)


def states() -> str:
    """Return the transition table as a diagram, with one arrow between two states."""
    lines = ["stateDiagram-v2", "    direction LR"]
    lines += [
        f'    state "{state.value}" as {state.name}' for state in RunState if "-" in state.value
    ]
    names = {state: state.name if "-" in state.value else state.value for state in RunState}
    lines.append(f"    [*] --> {names[RunState.STARTING]}")
    arrows: dict[tuple[RunState, RunState], list[str]] = {}
    for (before, event), after in TRANSITIONS.items():
        arrows.setdefault((before, after), []).append(event.value)
    lines += [
        f"    {names[before]} --> {names[after]}: {', '.join(events)}"
        for (before, after), events in arrows.items()
    ]
    lines += [f"    {names[state]} --> [*]" for state in RunState if state in TERMINAL]
    return "```mermaid\n" + "\n".join(lines) + "\n```"


def with_states(page: str) -> str:
    """Return the page with the current diagram between its marks."""
    head, rest = page.split(BEGIN)
    return f"{head}{BEGIN}\n\n{states()}\n\n{END}{rest.split(END)[1]}"


def table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Return a Markdown table, with bars in cells escaped."""
    lines = [titles, tuple("---" for _ in titles), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


if __name__ == "__main__":
    main()

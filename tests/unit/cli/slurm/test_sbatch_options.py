"""Options of sbatch as it reads them, on its command line and in its variables."""

from __future__ import annotations

import pytest

from elastic_ckpt.cli.slurm.sbatch_options import (
    SbatchOption,
    environment_for_sbatch,
    options_of_environment,
    read_options,
    value_of,
)
from elastic_ckpt.errors import UsageError


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ("--time=5", "--time=5"),
        ("--time 5", "--time=5"),
        ("-t5 -t 6", "--time=5 --time=6"),
        ("--comment --x", "--comment=--x"),
        ("--exclusive --nodes 2", "--exclusive --nodes=2"),
        ("-HWp low", "--hold --wait --partition=low"),
        ("--part low --requ", "--partition=low --requeue"),
        ("--nice=-5", "--nice=-5"),
        ("--gpus", None),
        ("--new-plugin=a --other b --third --hold", "--new-plugin=a --other=b --third --hold"),
        ("-Z", None),
        ("low", None),
        ("--hold low", None),
        ("-- low", None),
        ("-N1 : -N2", None),
    ],
)
def test_options_are_read_as_sbatch_does(words: str, read: str | None) -> None:
    if read is None:
        with pytest.raises(UsageError):
            read_options(words.split())
    else:
        assert " ".join(option.shown for option in read_options(words.split())) == read


def test_an_optional_value_is_attached() -> None:
    assert read_options(["-sX"]) == [SbatchOption("oversubscribe", "X")]


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("a,b[1-2]", "#SBATCH --x=a,b[1-2]"),
        ("a b", '#SBATCH --x="a b"'),
        ('"', '#SBATCH --x="\\""'),
        ("a\\b", '#SBATCH --x="a\\\\b"'),
        ("#", '#SBATCH --x="#"'),
        ("", '#SBATCH --x=""'),
    ],
)
def test_values_are_quoted_for_a_line(value: str, line: str) -> None:
    assert SbatchOption("x", value).line == line


@pytest.mark.parametrize("value", ["a\nb", "\x1b[0m", "x" * 5000])
def test_a_value_that_does_not_fit_a_line_is_refused(value: str) -> None:
    with pytest.raises(UsageError, match="does not fit an #SBATCH line"):
        _ = SbatchOption("comment", value).line


def test_variables_are_options() -> None:
    environ = {
        "SBATCH_PARTITION": "low", "SBATCH_TIMELIMIT": "5", "SBATCH_REQUEUE": "",
        "SBATCH_NO_REQUEUE": "0", "SBATCH_EXCLUSIVE": "", "SBATCH_MEM_BIND": "local",
        "SBATCH_PARSABLE": "1", "SBATCH_NONSENSE": "1", "SLURM_TIME": "1",
    }  # fmt: skip
    lines = [option.line for option in options_of_environment(environ)]
    assert lines == [
        "#SBATCH --exclusive  # SBATCH_EXCLUSIVE",
        "#SBATCH --partition=low  # SBATCH_PARTITION",
        "#SBATCH --requeue  # SBATCH_REQUEUE",
        "#SBATCH --time=5  # SBATCH_TIMELIMIT",
    ]


def test_a_job_does_not_inherit_from_the_one_that_submits_it() -> None:
    environ = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_CONF": "x", "SBATCH_WAIT": "1", "PATH": "p"}
    assert environment_for_sbatch(environ) == {
        "SLURM_ARRAY_TASK_ID": "1", "SLURM_CONF": "x", "PATH": "p",
    }  # fmt: skip
    inside = environ | {"SLURM_JOB_ID": "1", "SLURMD_NODENAME": "n1"}
    assert environment_for_sbatch(inside) == {"SLURM_CONF": "x", "PATH": "p"}


def test_the_last_value_counts() -> None:
    assert value_of(read_options(["-N1", "--nodes=2"]), "nodes") == "2"
    assert value_of([], "nodes") is None

"""The submitted batch script, and the examples in scripts/slurm that must equal it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from elastic_ckpt.cli.slurm.command import submit
from elastic_ckpt.errors import DirectoryUnusable, UsageError

SCRIPTS = Path(__file__).parents[4] / "scripts" / "slurm"


def dry_run(file: Path, *options: str) -> str:
    found = CliRunner().invoke(
        submit, [str(file), "--dry-run", "--", *options], catch_exceptions=False
    )
    assert found.exit_code == 0
    return found.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    copy = tmp_path / "job.toml"
    copy.write_text((SCRIPTS / "job.toml").read_text())
    (tmp_path / "train.py").touch()
    return copy


@pytest.mark.parametrize(("name", "options"), [("job", []), ("array", ["--array=1-4"])])
def test_the_examples_equal_the_submitted_script(file: Path, name: str, options: list[str]) -> None:
    expected = (SCRIPTS / f"{name}.sbatch").read_text()
    assert dry_run(file, *options).replace(str(file.parent), "/data/gpt") == expected
    check = subprocess.run(["bash", "-n"], input=expected, capture_output=True, text=True)
    assert (check.returncode, check.stderr) == (0, "")


def test_a_range_of_nodes_is_written_for_slurm(file: Path) -> None:
    file.write_text(file.read_text() + 'nnodes = "2:4"\n')
    assert "#SBATCH --nodes=2-4\n" in dry_run(file)


def test_invalid_nodes_are_refused(file: Path) -> None:
    file.write_text(file.read_text() + r'nnodes = "2\nrm -rf / #"' + "\n")
    with pytest.raises(UsageError, match="--nnodes"):
        dry_run(file)


def test_names_and_paths_are_quoted(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "a b'c;$(d).toml"
    text = file.read_text().replace('name = "gpt"', r'name = "x\nrm -rf /"')
    other.write_text(text)
    script = dry_run(other)
    assert "#SBATCH --job-name=x-rm--rf--\n" in script
    lines = script.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("srun"))
    line = "\n".join(lines[start : start + 2])
    words = subprocess.run(
        ["bash", "-c", f"srun() {{ printf '%s\\n' \"$@\"; }}; {line}"],
        capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    assert words[-1] == str(other)


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nproks = 2", "did you mean nproc"),
        ('nproc = "eight"', "invalid --nproc 'eight'"),
        ('keep-best = "2"', "--keep-best '2'"),
        ('replicas = 2\nmemory-dir = "off"', "leave one of them out"),
        ('notice-file = "/"', "--notice-file / is neither a file nor a FIFO"),
        ("[env]\nRANK = 1", "run sets this variable"),
        ("", r"no script .*train\.py"),
    ],
)
def test_what_no_node_would_run_is_not_submitted(
    file: Path, text: str, why: str, dry: list[str]
) -> None:
    file.write_text(f"{file.read_text()}\n{text}\n")
    if not text:
        (file.parent / "train.py").unlink()
    with pytest.raises(UsageError, match=why):
        CliRunner().invoke(submit, [str(file), *dry], catch_exceptions=False)


def test_what_the_nodes_alone_know_is_left_to_them(file: Path) -> None:
    file.write_text(file.read_text() + 'nnodes = 2\nnotice-source = ["slurm"]\n')
    assert "srun" in dry_run(file)
    (file.parent / "checkpoints").write_text("")
    with pytest.raises(DirectoryUnusable, match="checkpoints"):
        dry_run(file)


def test_a_dry_run_has_the_options_of_sbatch(file: Path) -> None:
    shown = dry_run(file, "--partition=low", "-t", "24:00:00", "--comment", "a b")
    assert "#SBATCH --partition=low\n#SBATCH -t 24:00:00\n#SBATCH --comment 'a b'\n" in shown

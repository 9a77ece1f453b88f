"""The submitted batch script, and the examples in scripts/slurm that must equal it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from elastic_ckpt.cli.slurm.command import submit
from elastic_ckpt.errors import DirectoryUnusable, SlurmRefused, UsageError, next_steps
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, find_job, remember_job

SCRIPTS = Path(__file__).parents[4] / "scripts" / "slurm"
PYTHON = "/data/venv/bin/python"


def invoke(file: Path, *words: str) -> Result:
    return CliRunner().invoke(submit, [str(file), *words], catch_exceptions=False)


def dry_run(file: Path, *options: str) -> str:
    found = invoke(file, "--dry-run", "--", *options)
    assert found.exit_code == 0
    return found.output


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "job.toml"
    copy.write_text((SCRIPTS / "job.toml").read_text())
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", PYTHON)
    for name in os.environ:
        if name.startswith(("SBATCH_", "SLURM", "PYTHONPATH", "ELASTIC_CKPT")):
            monkeypatch.delenv(name)
    return copy


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for sbatch: notes its arguments, environment and script; answers 4711."""
    place = tmp_path / "opt bin"
    place.mkdir()
    program = place / "sbatch"
    program.write_text(
        f'#!/bin/sh\n{{ echo "args: $*"; env; cat; }} > "{tmp_path}/seen"\n'
        'case "$*" in *test-only*) echo "sbatch: Job 1 starts at once" >&2;; *) echo 4711;; esac\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return tmp_path / "seen"


def run_step(script: str, before: str = "", code: int = 0, number: str = "") -> str:
    """Run a script with a fake srun and hook, which print their arguments one per line."""
    found = subprocess.run(
        ["bash", "-c", f"{before}\n{script}"], text=True, capture_output=True, timeout=30,
        env={"PATH": os.environ["PATH"], "SLURM_JOB_NUM_NODES": "2", "CODE": str(code),
             "SLURM_ARRAY_TASK_ID": number},
    )  # fmt: skip
    return found.stdout + found.stderr + f"exit {found.returncode}\n"


@pytest.fixture
def fakes(tmp_path: Path) -> str:
    """A line of shell that puts a fake srun on the path."""
    place = tmp_path / "fakes"
    place.mkdir()
    srun = place / "srun"
    srun.write_text('#!/bin/bash\nprintf "srun %s\\n" "$@"\n. "$0.more"\nexit $CODE\n')
    (place / "srun.more").write_text("")
    hook = place / "python"
    hook.write_text('#!/bin/bash\nprintf "hook %s\\n" "$*"\nexit "${@: -1}"\n')
    for program in (srun, hook):
        program.chmod(0o755)
    return f'PATH="{place}:$PATH"'


def with_hook(script: str, tmp_path: Path) -> str:
    return script.replace(PYTHON, str(tmp_path / "fakes" / "python"))


@pytest.mark.parametrize(("name", "options"), [("job", []), ("array", ["--array=1-4"])])
def test_the_examples_equal_the_submitted_script(file: Path, name: str, options: list[str]) -> None:
    expected = (SCRIPTS / f"{name}.sbatch").read_text()
    assert dry_run(file, *options).replace(str(file.parent), "/data/gpt") == expected


def test_options_of_sbatch_are_lines(file: Path) -> None:
    script = dry_run(file, "-p", "low", "--time", "60", "--nodes=1", "--comment=a 'b' #c", "-H")
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert directives[-5:] == [
        "#SBATCH --partition=low",
        "#SBATCH --time=60",
        "#SBATCH --nodes=1",
        "#SBATCH --comment=\"a 'b' #c\"",
        "#SBATCH --hold",
    ]
    assert script.count("--nodes=") == 1  # the default is replaced
    assert "#SBATCH --requeue" in script
    assert "#SBATCH --requeue" not in dry_run(file, "--no-requeue")


def test_a_variable_of_sbatch_is_a_line_and_the_command_line_follows(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
    script = dry_run(file, "--time=60")
    assert script.index("--time=5  # SBATCH_TIMELIMIT") < script.index("#SBATCH --time=60")


def test_what_is_submitted_equals_the_dry_run(
    file: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "proj")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    monkeypatch.setenv("SLURM_CONF", "/etc/own.conf")
    script = dry_run(file, "--time=60")
    found = invoke(file, "--", "--time=60")
    assert found.output == "submitted job 4711: elastic-ckpt status 4711\n"
    seen = sbatch.read_text()
    assert seen.endswith(script) and seen.startswith("args: --parsable\n")
    variables = seen.removesuffix(script)
    assert "SLURM_CONF=/etc/own.conf" in variables
    for gone in ("SBATCH_ACCOUNT", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        assert f"\n{gone}=" not in variables
    assert f"export PATH=\"$PATH\":'{file.parent}/opt bin'\n" in script


def test_an_array_names_its_first_task(file: Path, sbatch: Path) -> None:
    assert "status 4711_3\n" in invoke(file, "--", "--array=3-9%2").output
    job = find_job("4711_4")
    assert job is not None and job.directory == file.parent / "checkpoints" / "task-4"


def test_the_command_of_a_submission_is_recorded(
    file: Path, sbatch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "proj")
    monkeypatch.setattr("sys.argv", ["/opt/elastic-ckpt"])
    invoke(file, "--", "-t60", "--comment=a b")
    job = find_job("4711")
    assert job is not None and job.submit == (
        f"cd {file.parent} && /opt/elastic-ckpt slurm submit {file} -- --account=proj --time=60 "
        "'--comment=a b'"
    )


@pytest.mark.parametrize(
    ("queue", "options", "refused"),
    [
        ("3 N/A PENDING BeginTime", [], "job 3 .*PENDING, BeginTime.*scancel 3 first"),
        ("3 N/A RUNNING None", [], r"\(RUNNING\).*--dependency=afterany:3"),
        ("3 N/A RUNNING None", ["--dependency=afterany:3"], ""),
        ("3 N/A COMPLETING None", [], ""),
        ("9 N/A RUNNING None", [], ""),
        ("3 N/A RUNNING None", ["--array=1-2"], ""),
        ("5 2 PENDING Priority", ["--array=1-2"], "job 5_2 of the same directory"),
        ("5 2 PENDING Priority", ["--array=3"], ""),
        ("5 2 PENDING Priority", [], ""),
    ],
)
def test_a_second_job_of_the_same_directory_is_refused(
    file: Path, sbatch: Path, queue: str, options: list[str], refused: str
) -> None:
    squeue = Path(os.environ["PATH"].split(os.pathsep)[0]) / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '{queue}'\n")
    squeue.chmod(0o755)
    remember_job("3", SlurmJob(file.parent / "checkpoints"))
    remember_job("5", SlurmJob(file.parent / "checkpoints", "submit", "1-4"))
    if refused:
        with pytest.raises(UsageError, match=refused):
            invoke(file, "--", *options)
        assert not sbatch.exists()
        options = [*options, "--test-only"]
    assert invoke(file, "--", *options).exit_code == 0


def test_an_error_in_the_job_file_ends_with_submit_again(file: Path) -> None:
    file.write_text('script = "train.py"\n')
    with pytest.raises(UsageError, match=rf"^{file}: missing dir$") as caught:
        invoke(file, "--", "--time=60", "--comment=a b")
    assert next_steps(caught.value) == (
        "elastic-ckpt: next: correct the job file, then:",
        f"  elastic-ckpt slurm submit {file} -- --time=60 '--comment=a b'",
    )
    file.write_text('dir = "x"\n')
    with pytest.raises(UsageError, match=rf"^{file}: missing script: the training script"):
        invoke(file)


@pytest.mark.parametrize(
    ("options", "is_refused"),
    [
        (["--output=logs/%x-%j.out"], True),
        (["-e", "logs/x"], True),
        (["--chdir=sub", "--output=logs/x"], True),
        (["--output=%x/%j.out"], False),
        (["--output=%j.out"], False),
        (["--output=/only/on/nodes/%j.out"], False),
        (["--output=sub/%j.out"], False),
        (["--output=none"], False),
    ],
)
def test_output_without_a_folder_is_refused(
    file: Path, options: list[str], is_refused: bool
) -> None:
    (file.parent / "sub").mkdir()
    if is_refused:
        with pytest.raises(UsageError, match=r"mkdir .*logs"):
            dry_run(file, *options)
    else:
        assert "srun" in dry_run(file, *options)


def test_an_option_of_sbatch_before_the_dashes_is_refused_with_its_place(file: Path) -> None:
    with pytest.raises(UsageError, match=r"submit job\.toml -- --time$"):
        invoke(file, "--time=5")
    with pytest.raises(UsageError, match="did you mean --dry-run"):
        invoke(file, "--dry-rum")
    with pytest.raises(UsageError, match=r"put it before --, as in: .* --dry-run -- --time=60"):
        invoke(file, "--", "--array=1-2", "--dry-run")


def test_test_only_submits_nothing(file: Path, sbatch: Path) -> None:
    found = invoke(file, "--", "--test-only", "--time=5")
    assert found.output == "not submitted: Job 1 starts at once\n"
    seen = sbatch.read_text()
    assert seen.startswith("args: --parsable --test-only\n") and "#SBATCH --test-only" not in seen


def test_without_sbatch_the_error_says_where_to_run_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SlurmRefused, match="on a node of a SLURM cluster"):
        invoke(file)


def test_a_range_of_nodes_is_written_for_slurm(file: Path) -> None:
    file.write_text(file.read_text() + 'nnodes = "2:4"\n')
    assert "#SBATCH --nodes=2-4\n" in dry_run(file)


def test_names_and_paths_are_quoted(file: Path, tmp_path: Path, fakes: str) -> None:
    other = tmp_path / "a b'c;$(d).toml"
    text = file.read_text().replace('name = "gpt"', r'name = "x\nrm -rf /"')
    other.write_text(text + 'srun = ["--container-image=a b"]\n')
    script = dry_run(other, "--array=1")
    assert "#SBATCH --job-name=x-rm--rf--\n" in script
    said = run_step(with_hook(script, tmp_path), fakes, number="7")
    assert f"srun {other}\n" in said
    assert f"srun {tmp_path}/checkpoints/task-7\n" in said
    assert "srun --container-image=a b\n" in said and said.endswith("exit 0\n")


def test_tasks_of_an_array_have_their_own_mirrors(file: Path) -> None:
    file.write_text(file.read_text() + 'mirror = "s3://bucket/job"\n')
    assert '--mirror s3://bucket/job/task-"$SLURM_ARRAY_TASK_ID"' in dry_run(file, "--array=1-2")
    assert "--mirror" not in dry_run(file)


def test_setup_is_run_before_and_its_environment_is_kept(
    file: Path, tmp_path: Path, fakes: str
) -> None:
    file.write_text(
        file.read_text() + 'setup = ["set -euo pipefail", "cd /", "if true; then", '
        "\"export MARK='a b'\", 'fi']\nsupervisor-python = 'launch \"$MARK\" python3'\n"
    )
    said = run_step(with_hook(dry_run(file), tmp_path), fakes, code=75)
    assert "srun launch\nsrun a b\nsrun python3\nsrun -m\n" in said
    assert "hook -m elastic_ckpt slurm requeue-hook 75\nexit 75\n" in said


def test_failed_setup_starts_nothing(file: Path, tmp_path: Path, fakes: str) -> None:
    file.write_text(file.read_text() + 'setup = """\nfalse || true\nls /no/such/dir\n"""\n')
    said = run_step(with_hook(dry_run(file), tmp_path), fakes)
    assert f"setup failed: ls /no/such/dir (line 2 of setup in {file})\n" in said
    assert "srun" not in said and said.endswith("exit 70\n")


@pytest.mark.parametrize(
    ("sourced", "before", "failed"),
    [
        ("false\ntrue\n", "", ""),
        ("true\nfalse\n", "", "source {rc} (line 2 of setup in {file})"),
        ("true\nfalse\ntrue\n", "set -e", "false (line 2 of {rc})"),
        ("f() { false; true; }\nf\n", "", ""),
    ],
)
def test_a_sourced_file_counts_by_its_status(
    file: Path, tmp_path: Path, fakes: str, sourced: str, before: str, failed: str
) -> None:
    rc = tmp_path / "rc.sh"
    rc.write_text(sourced)
    file.write_text(file.read_text() + f'setup = ["{before}", "source {rc}"]\n')
    said = run_step(with_hook(dry_run(file), tmp_path), fakes)
    if failed:
        message = f"setup failed: {failed.format(rc=rc, file=file)}\n"
        assert message in said and said.endswith("exit 70\n")
    else:
        assert "srun" in said and said.endswith("exit 0\n")


@pytest.mark.parametrize(("sent", "received"), [("USR1",) * 2, ("USR2",) * 2, ("TERM", "USR1")])
def test_a_signal_to_the_shell_reaches_the_step(
    file: Path, tmp_path: Path, fakes: str, sent: str, received: str
) -> None:
    """And the shell waits for what the step makes of it, a second signal included."""
    (tmp_path / "fakes" / "srun.more").write_text(
        f"n=0; trap 'n=$((n + 1)); echo step got {received}' {received}\n"
        f"kill -{sent} $PPID; until [ $n -gt 0 ] || [ $SECONDS -gt 20 ]; do sleep 0.05; done\n"
        f"kill -{sent} $PPID; until [ $n -gt 1 ] || [ $SECONDS -gt 20 ]; do sleep 0.05; done\n"
        "exit 75\n"
    )
    said = run_step(with_hook(dry_run(file), tmp_path), fakes)
    assert said.count(f"step got {received}") >= 2
    assert said.endswith("requeue-hook 75\nexit 75\n")


def test_a_signal_before_the_step_asks_for_another_run(
    file: Path, tmp_path: Path, fakes: str
) -> None:
    file.write_text(file.read_text() + 'setup = "kill -USR1 $$"\n')
    said = run_step(with_hook(dry_run(file), tmp_path), fakes)
    assert "srun" not in said and said.endswith("requeue-hook 76\nexit 76\n")


@pytest.mark.parametrize(("code", "passed"), [(0, 0), (70, 70), (137, 137), (138, 76), (143, 76)])
def test_an_early_signal_asks_for_another_run(
    file: Path, tmp_path: Path, fakes: str, code: int, passed: int
) -> None:
    """A supervisor that handles signals never ends by one; a launcher around it may."""
    said = run_step(with_hook(dry_run(file), tmp_path), fakes, code=code)
    assert said.endswith(f"requeue-hook {passed}\nexit {passed}\n")


def test_a_source_checkout_is_found_without_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "PYTHONPATH" not in dry_run(file)
    root = Path(__file__).parents[4]
    monkeypatch.setenv("PYTHONPATH", f"/other{os.pathsep}{root}")
    assert f'export PYTHONPATH={root}"${{PYTHONPATH:+:$PYTHONPATH}}"\n' in dry_run(file)


def test_the_directory_of_the_environment_is_written(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTIC_CKPT_DIR", "/shared/other")
    assert "--dir /shared/other &\n" in dry_run(file)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('nnodes = "2\\nrm -rf / #"', "nnodes"),
        ("nproks = 2", "did you mean nproc"),
        ("setp = []", "did you mean setup"),
        ('nproc = "eight"', r"job\.toml: invalid nproc 'eight'"),
        ('time = "10:00"', r"option of sbatch.* submit job\.toml -- --time=\.\.\."),
        ("setup = [1]", "setup must be a string or a list of strings"),
        ('setup = "if true"', "not valid shell: line"),
        ('srun = ["image"]', '"--name=value"'),
        ('srun = ["--ntasks-per-node=8"]', "several supervisors"),
        ('supervisor-python = "a\\nb"', "one line"),
        ('mtbf = "6h"', "save-interval auto"),
        ('keep-best = "2"', "keep-best '2'"),
        ('replicas = 2\nmemory-dir = "off"', "leave one of them out"),
        ('notice-file = "/"', "notice-file / is neither a file nor a FIFO"),
        ("[env]\nRANK = 1", "run sets this variable"),
    ],
)
def test_an_invalid_job_file_is_not_submitted(file: Path, more: str, message: str) -> None:
    text = file.read_text().replace('save-interval = "auto"\n', "")
    file.write_text(f"{text}{more}\n")
    for words in ([], ["--dry-run"]):
        with pytest.raises(UsageError, match=message):
            invoke(file, *words)


def test_a_missing_script_is_refused_unless_a_container_has_it(file: Path) -> None:
    (file.parent / "train.py").unlink()
    for words in ([], ["--dry-run"]):
        with pytest.raises(UsageError, match=r"no script .*train\.py"):
            invoke(file, *words)
    text = file.read_text()
    for more in (
        'srun = ["--container-image=gpt"]',
        'supervisor-python = "apptainer exec gpt.sif python"',
    ):
        file.write_text(f"{text}{more}\n")
        assert "train.py" not in dry_run(file)


def test_several_nodes_with_a_bucket_are_checked_as_in_the_job(file: Path) -> None:
    text = file.read_text().replace('"checkpoints"', '"s3://bucket/job"')
    file.write_text(text + 'nnodes = 2\nbucket-rate = "5MB"\n')
    with pytest.raises(UsageError, match="with dir URL the ranks of several nodes"):
        dry_run(file)


def test_what_the_nodes_alone_know_is_left_to_them(file: Path) -> None:
    file.write_text(file.read_text() + 'nnodes = 2\nnotice-source = ["slurm"]\n')
    assert "srun" in dry_run(file)
    (file.parent / "checkpoints").write_text("")
    with pytest.raises(DirectoryUnusable, match="checkpoints"):
        dry_run(file)


def test_a_directory_without_permission_is_refused_unless_it_is_a_container_s(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "elastic_ckpt.cli.slurm.checks.os.access", lambda _, mode: not mode & os.W_OK
    )
    with pytest.raises(DirectoryUnusable, match="cannot write to"):
        dry_run(file)
    file.write_text(file.read_text() + 'srun = ["--container-image=gpt"]\n')
    assert "srun" in dry_run(file)

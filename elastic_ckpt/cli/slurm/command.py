"""``elastic-ckpt slurm``: submit a job file, and queue a job again that asks for it."""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from elastic_ckpt.cli.slurm.requeue import Verdict, judge
from elastic_ckpt.errors import ElasticCkptError, ExitCode, SlurmRefused, UsageError
from elastic_ckpt.jobdir.slurm_jobs import find_job, remember_job
from elastic_ckpt.util.text import printable

_ANSWER_SECONDS = 60.0
_PATIENCE_SECONDS = 300.0
_AGAIN_SECONDS = 5.0


@click.group("slurm")
def command() -> None:
    """Submit a job to SLURM, and have it queued again.

    \b
      elastic-ckpt slurm submit job.toml -- --time=24:00:00 --gres=gpu:8
      elastic-ckpt status 4711
      elastic-ckpt slurm requeue-hook $?
    """


@command.command("submit")
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the batch script, and submit nothing.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def submit(job_file: Path, dry_run: bool, options: tuple[str, ...]) -> int:
    """Submit JOB_FILE as a batch job that is queued again.

    \b
      elastic-ckpt slurm submit job.toml -- --partition=low --time=24:00:00
      elastic-ckpt slurm submit job.toml --dry-run > job.sbatch

    It saves when it is preempted and when its time is nearly over. Everything behind -- goes to
    sbatch. With --array each task has a directory of its own.

    Exits with 0, with 70 if SLURM refuses it.
    """
    from elastic_ckpt.cli.run.build_settings import check_script
    from elastic_ckpt.cli.run.command import parse

    params = parse(["--config", str(job_file)])
    script = batch_script(job_file.absolute(), params, options)
    if dry_run:
        click.echo(script, nl=False)
        return 0
    check_script(params["script"])
    number = _sbatch(options, script)
    if not is_array(options):  # whose tasks have directories of their own
        remember_job(number, Path(params["directory"]).absolute())
    task = "_TASK" if is_array(options) else ""
    click.echo(f"submitted job {number}: elastic-ckpt status {number}{task}")
    return 0


@command.command("requeue-hook")
@click.argument("code", type=int)
def requeue_hook(code: int) -> int:
    """Queue this job again if exit code CODE asks for it.

    \b
      srun elastic-ckpt run --config job.toml
      elastic-ckpt slurm requeue-hook $?

    The last line of a batch script: CODE is the one of elastic-ckpt run, and 75 and 76 ask for
    it. A job that somebody cancelled is left alone.

    Exits with CODE, or with 70 if ten runs in a row have made no checkpoint: then nobody queues
    it again.
    """
    from elastic_ckpt.notices.slurm import (
        grace_seconds,
        job_id,
        requeue_exit_codes,
        scontrol,
        show_job,
    )

    job = job_id()
    if not job:
        raise UsageError("requeue-hook is for a batch script: SLURM_JOB_ID is not set")

    def look_and_act() -> Verdict:
        shown = show_job(job)
        verdict = judge(
            code,
            shown,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            requeue_exit=requeue_exit_codes(),
            grace=grace_seconds(shown.get("Partition", "")),
            fruitless=_fruitless_runs(job),
        )
        if verdict.requeue:
            scontrol("requeue", job)
        return verdict

    try:
        verdict = _patiently(look_and_act, job)
    except SlurmRefused as error:
        click.echo(f"elastic-ckpt: error: {error}", err=True)
        return code  # on which SLURM may act by itself
    what = "queued again" if verdict.requeue else "not queued again from here"
    hint = f": see elastic-ckpt status {job}" if verdict.gave_up else ""
    click.echo(f"elastic-ckpt: job {job} is {what}: {verdict.why}{hint}", err=True)
    return int(ExitCode.FAILED) if verdict.gave_up else code


def _fruitless_runs(job: str) -> int:
    """Runs in a row without a checkpoint, by the journal; 0 where nobody knows."""
    from elastic_ckpt.jobdir.paths import JobDirectory
    from elastic_ckpt.journal.journal import read_journal

    directory = find_job(job)
    if directory is None:
        return 0
    runs: set[str] = set()  # each of whose nodes writes of its own start
    try:
        for event in read_journal(JobDirectory.at(directory)):
            if event.event in ("saved", "drained"):
                runs.clear()
            elif event.event == "start":
                runs.add(str(event.data.get("slurm_restarts")))
    except (OSError, ElasticCkptError):
        return 0
    return len(runs)


def _patiently(look_and_act: Callable[[], Verdict], job: str) -> Verdict:
    """Once more, and again, if the controller does not answer: it may be on its way to another
    host, and nothing ends the job meanwhile."""
    from elastic_ckpt.notices.slurm import SlurmUnanswered

    limit = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return look_and_act()
        except SlurmUnanswered as error:
            final = "disabled" in str(error) or "Invalid" in str(error)
            if final or time.monotonic() > limit:
                hint = "; submit it with --requeue" if "disabled" in str(error) else ""
                raise SlurmRefused(f"job {job} cannot be queued again: {error}{hint}") from None
            click.echo(f"elastic-ckpt: {error}: trying again", err=True)
            time.sleep(_AGAIN_SECONDS)


def _sbatch(options: Sequence[str], script: str) -> str:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options],
            input=script, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmRefused(f"sbatch: {error}: is this a node of a SLURM cluster?") from None
    if done.returncode != 0:
        raise SlurmRefused(printable(" ".join(done.stderr.split())) or "sbatch failed")
    return done.stdout.strip().partition(";")[0]


_SCRIPT: Final = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}

# When a job is cancelled or out of time this shell is told, too, and has to stay until the save is
# done. It must not pass the signal on: srun would kill its tasks.
trap : TERM

# One supervisor on each node; it launches the workers. Since 22.05 srun does not take the number of
# processors over by itself.
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
    elastic-ckpt run --config {config}{directory}
code=$?

# 75 and 76 ask for another run. Whether the job was cancelled meanwhile, SLURM knows.
elastic-ckpt slurm requeue-hook "$code"
"""


def batch_script(job_file: Path, params: Mapping[str, Any], options: Sequence[str] = ()) -> str:
    """The text for sbatch.

    Args:
        params: of the job file, as ``run`` has them.
        options: for sbatch; with an array each task has a directory of its own.
    """
    from elastic_ckpt.protocol.rendezvous import parse_nodes

    array = is_array(options)
    directory = Path(params["directory"]).absolute()
    task = f' --dir {shlex.quote(str(directory))}/task-"$SLURM_ARRAY_TASK_ID"'
    least, most = parse_nodes(params.get("nnodes") or "1")
    return _SCRIPT.format(
        name=_word(params.get("name") or directory.name),
        nodes=f"{least}-{most}" if most > least else str(least),
        output="slurm-%A_%a.out" if array else "slurm-%j.out",
        config=shlex.quote(str(job_file)),
        directory=task if array else "",
    )


def is_array(options: Sequence[str]) -> bool:
    """Whether these options of sbatch make an array of jobs."""
    return "SBATCH_ARRAY_INX" in os.environ or any(
        option.startswith(("--ar", "-a")) for option in options
    )


def _word(text: str) -> str:
    """A name that can stand in a line of sbatch."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text) or "job"

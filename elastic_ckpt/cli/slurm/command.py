"""``elastic-ckpt slurm``: submit a job file, and requeue a job that asks for it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.slurm.requeue import RequeueDecision, decide_requeue
from elastic_ckpt.errors import (
    DirectoryUnusable,
    ElasticCkptError,
    ExitCode,
    SlurmRefused,
    UsageError,
)
from elastic_ckpt.jobdir.answering import require_answer
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.slurm_jobs import find_job, remember_job
from elastic_ckpt.protocol.rendezvous import parse_nodes
from elastic_ckpt.util.text import printable

_ANSWER_SECONDS = 60.0
_PATIENCE_SECONDS = 300.0


@click.group("slurm")
def command() -> None:
    """Submit a job to SLURM, and requeue it.

    \b
      elastic-ckpt slurm submit job.toml -- --time=24:00:00 --gres=gpu:8
      elastic-ckpt status 4711
      elastic-ckpt slurm requeue-hook $?
    """


@command.command("submit")
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the batch script without submitting it.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def submit(job_file: Path, dry_run: bool, options: tuple[str, ...]) -> int:
    """Submit JOB_FILE as a batch job that is requeued.

    \b
      elastic-ckpt slurm submit job.toml -- --partition=low --time=24:00:00
      elastic-ckpt slurm submit job.toml --dry-run > job.sbatch

    It saves when it is preempted and before its time limit. Everything after -- goes to sbatch.
    With --array each task has its own directory.

    Exits with 0, with 70 if SLURM refuses it.
    """
    from elastic_ckpt.cli.run.build_settings import check_anywhere
    from elastic_ckpt.cli.run.command import parse

    params = parse(["--config", str(job_file)])
    script = batch_script(job_file.absolute(), params, options, dry=dry_run)
    check_anywhere(**params)
    _require_writable(params["directory"])
    if dry_run:
        click.echo(script, nl=False)
        return 0
    number = _sbatch(options, script)
    # Tasks of an array have their own directories; a bucket's job is known where it runs.
    if not is_array(options) and isinstance(params["directory"], Path):
        remember_job(number, params["directory"].absolute())
    task = "_TASK" if is_array(options) else ""
    click.echo(f"submitted job {number}: elastic-ckpt status {number}{task}")
    return 0


@command.command("requeue-hook")
@click.argument("code", type=int)
def requeue_hook(code: int) -> int:
    """Requeue this job if exit code CODE asks for it.

    \b
      srun elastic-ckpt run --config job.toml
      elastic-ckpt slurm requeue-hook $?

    The last line of a batch script: CODE is the exit code of elastic-ckpt run, and 75 and 76 ask
    for it. A cancelled job is left alone.

    Exits with CODE, or with 70 if ten consecutive runs made no checkpoint, so that SLURM does not
    requeue it either.
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
        raise UsageError("SLURM_JOB_ID is not set: use requeue-hook in a batch script")

    def requeue_if_asked() -> RequeueDecision:
        shown = show_job(job)
        decision = decide_requeue(
            code,
            shown,
            restarts=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            requeue_exit=requeue_exit_codes(),
            grace=grace_seconds(shown.get("Partition", "")),
            fruitless=_fruitless_runs(job),
        )
        if decision.requeue:
            scontrol("requeue", job)
        return decision

    try:
        decision = _retry(requeue_if_asked, job)
    except SlurmRefused as error:
        click.echo(f"elastic-ckpt: error: {error}", err=True)
        return code  # SLURM itself may act on it
    what = "requeued" if decision.requeue else "not requeued from here"
    hint = f": see elastic-ckpt status {job}" if decision.gave_up else ""
    click.echo(f"elastic-ckpt: job {job} is {what}: {decision.why}{hint}", err=True)
    return int(ExitCode.FAILED) if decision.gave_up else code


def _fruitless_runs(job: str) -> int:
    """Return the number of consecutive runs without a checkpoint, by the journal; 0 if unknown."""
    from elastic_ckpt.journal.events import Drained, RunStarted, Saved
    from elastic_ckpt.journal.journal import read_journal

    directory = find_job(job)
    if directory is None:
        return 0
    runs: set[str] = set()  # each node of a run writes its own start
    try:
        for entry in read_journal(JobDirectory.at(directory)):
            match entry.event:
                case Saved() | Drained():
                    runs.clear()
                case RunStarted(slurm_restarts=restarts):
                    runs.add(str(restarts))
    except (OSError, ElasticCkptError):
        return 0
    return len(runs)


def _retry(call: Callable[[], RequeueDecision], job: str) -> RequeueDecision:
    """Retry while the controller does not answer: it may be moving to another host.

    Raises:
        SlurmRefused: the controller refused, or did not answer for ``_PATIENCE_SECONDS``.
    """
    import stamina
    from stamina.instrumentation import RetryDetails, set_on_retry_hooks

    from elastic_ckpt.notices.slurm import SlurmUnanswered

    def is_unanswered(error: Exception) -> bool:
        is_final = "disabled" in str(error) or "Invalid" in str(error)
        return isinstance(error, SlurmUnanswered) and not is_final

    def report(details: RetryDetails) -> None:
        wait = f"retrying in {details.wait_for:.0f} s"
        click.echo(f"elastic-ckpt: {details.caused_by}: {wait}", err=True)

    set_on_retry_hooks([report])  # instead of a log message and a Prometheus counter
    retrying = stamina.RetryingCaller(
        attempts=None, timeout=_PATIENCE_SECONDS, wait_initial=1.0, wait_max=15.0
    )
    try:
        return retrying(is_unanswered, call)
    except SlurmUnanswered as error:
        hint = "; submit it with --requeue" if "disabled" in str(error) else ""
        raise SlurmRefused(f"cannot requeue job {job}: {error}{hint}") from None


def _require_writable(directory: Path | BucketUrl) -> None:
    """Raise DirectoryUnusable for a directory that is here, or would be made here, and cannot be
    written to. One whose parent is only on the nodes is left to them."""
    if isinstance(directory, BucketUrl):
        return
    require_answer(directory)
    if directory.exists():
        JobDirectory.at(directory).check_readable()
    place = directory if directory.exists() else directory.absolute().parent
    if place.exists() and not os.access(place, os.W_OK | os.X_OK):
        raise DirectoryUnusable(f"cannot write to {place}: fix its permissions, or choose another")


def _sbatch(options: Sequence[str], script: str) -> str:
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *options],
            input=script, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmRefused(f"sbatch: {error}: run this on a node of a SLURM cluster") from None
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
{options}
# On a cancellation or time limit this shell is signalled as well, and must live until the save is
# done. It must not pass the signal on: srun would kill its tasks.
trap : TERM

# One supervisor per node; it launches the workers. Since 22.05 srun does not inherit the number of
# processors.
srun ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} \\
    elastic-ckpt run --config {config}{directory}
code=$?

# 75 and 76 ask for another run, unless the job was cancelled meanwhile.
elastic-ckpt slurm requeue-hook "$code"
"""


def batch_script(
    job_file: Path, params: Mapping[str, Any], options: Sequence[str] = (), *, dry: bool = False
) -> str:
    """Return the batch script for sbatch.

    Args:
        params: the options of ``run`` from the job file.
        options: for sbatch; with an array each task has its own directory.
        dry: write these options into the script, for an sbatch without them.
    """
    array = is_array(options)
    directory = params["directory"]
    if isinstance(directory, Path):
        directory = directory.absolute()
    task = f' --dir {shlex.quote(str(directory))}/task-"$SLURM_ARRAY_TASK_ID"'
    least, most = parse_nodes(params.get("nnodes") or "1")
    return _SCRIPT.format(
        name=_word(params.get("name") or str(directory).rpartition("/")[2]),
        nodes=f"{least}-{most}" if most > least else str(least),
        output="slurm-%A_%a.out" if array else "slurm-%j.out",
        config=shlex.quote(str(job_file)),
        directory=task if array else "",
        options="".join(f"#SBATCH {line}\n" for line in _option_lines(options)) if dry else "",
    )


def _option_lines(options: Sequence[str]) -> list[str]:
    """Return a line per option, with its value if that is a word of its own."""
    lines: list[str] = []
    for word in options:
        if word.startswith("-") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return [line.replace("\n", " ") for line in lines]


def is_array(options: Sequence[str]) -> bool:
    """Whether these sbatch options submit a job array."""
    return "SBATCH_ARRAY_INX" in os.environ or any(
        option.startswith(("--ar", "-a")) for option in options
    )


def _word(text: str) -> str:
    """Return a text that is safe in an #SBATCH line."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text) or "job"

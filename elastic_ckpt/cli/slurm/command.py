"""``elastic-ckpt slurm``: submit a job file, and requeue a job that asks for it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from elastic_ckpt.cli.slurm.requeue import RequeueDecision, decide_requeue
from elastic_ckpt.errors import ElasticCkptError, ExitCode, SlurmRefused, UsageError
from elastic_ckpt.jobdir.slurm_jobs import SlurmJob, find_job, remember_job
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


class _Submit(click.Command):
    """Says where options of sbatch belong."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            close = f"; did you mean {error.possibilities[0]}?" if error.possibilities else ""
            raise UsageError(
                f"submit has no option {error.option_name}{close}; options of sbatch follow --, "
                f"as in: elastic-ckpt slurm submit job.toml -- {error.option_name}"
            ) from None


@command.command("submit", cls=_Submit)
@click.argument("job_file", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the batch script without submitting it.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def submit(job_file: Path, dry_run: bool, options: tuple[str, ...]) -> int:
    """Submit JOB_FILE as a batch job that is requeued.

    \b
      elastic-ckpt slurm submit job.toml -- --partition=low --time=24:00:00
      elastic-ckpt slurm submit job.toml --dry-run -- --time=60 > job.sbatch
      elastic-ckpt slurm submit job.toml -- --array=1-8 --gres=gpu:1
      elastic-ckpt slurm submit job.toml -- --test-only

    It saves when it is preempted and before its time limit. Everything after -- goes to sbatch, as
    lines of the script, and so do SBATCH_* variables. The job file and the options are checked
    first. With --array each task has its own directory; one supervisor runs per node.

    Exits with 0, with 64 if the job file or an option is wrong, with 70 if SLURM refuses it.
    """
    from elastic_ckpt.cli.run.command import parse
    from elastic_ckpt.cli.run.job_file import read_batch_keys
    from elastic_ckpt.cli.slurm import checks
    from elastic_ckpt.cli.slurm.job_file_errors import job_file_errors
    from elastic_ckpt.cli.slurm.sbatch_options import (
        options_of_environment,
        read_options,
        split_options,
        submit_line,
        value_of,
    )
    from elastic_ckpt.cli.slurm.script import batch_script

    with job_file_errors(job_file, options):
        params = parse(["--config", str(job_file)])
        keys = read_batch_keys(job_file)
    checks.check_keys(keys)
    job, call = split_options([*options_of_environment(os.environ), *read_options(options)])
    checks.check_options([*job, *call], params)
    is_elsewhere = checks.is_elsewhere(keys)
    if not is_elsewhere:
        checks.check_directory(params["directory"])
    nodes = checks.node_range(job, params)
    with job_file_errors(job_file, options):
        checks.check_settings(params, nodes, is_elsewhere=is_elsewhere)
    script = batch_script(job_file.absolute(), params, keys, job)
    with job_file_errors(job_file, options):
        checks.check_syntax(script)
    if dry_run:
        click.echo(script, nl=False)
        return 0
    words = [option.shown for option in call if option.name in ("test-only", "verbose")]
    if "--test-only" in words:
        click.echo(f"not submitted: {_sbatch(words, script)}")
        return 0
    checks.check_queue(params["directory"], job)
    answer = _sbatch(words, script)
    if isinstance(params["directory"], Path):  # a bucket's job is known where it runs
        submit = submit_line(job_file, job)
        array = value_of(job, "array") or ""
        remember_job(answer, SlurmJob(params["directory"].absolute(), submit, array))
    click.echo(f"submitted job {answer}: elastic-ckpt status {answer}{checks.first_task(job)}")
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
        click.echo(f"elastic-ckpt: error: {error}{_again(job)}", err=True)
        return code  # SLURM itself may act on it
    if code == ExitCode.FINISHED:
        return code
    what = "requeued" if decision.requeue else "not requeued from here"
    hint = f": see elastic-ckpt status {job}" if decision.gave_up else ""
    hint = _again(job) if decision.cancelled else hint
    click.echo(f"elastic-ckpt: job {job} is {what}: {decision.why}{hint}", err=True)
    return int(ExitCode.FAILED) if decision.gave_up else code


def _again(job: str) -> str:
    """Return how to submit the job again, on a line of its own; empty if that is unknown."""
    known = find_job(job)
    submit = printable(known.submit, 200_000) if known is not None else ""
    return f"; to submit it again:\n  {submit}" if submit else ""


def _fruitless_runs(job: str) -> int:
    """Return the number of consecutive runs without a checkpoint, by the journal; 0 if unknown."""
    from elastic_ckpt.jobdir.paths import JobDirectory
    from elastic_ckpt.journal.events import Drained, RunStarted, Saved
    from elastic_ckpt.journal.journal import read_journal

    known = find_job(job)
    if known is None:
        return 0
    runs: set[str] = set()  # each node of a run writes its own start
    try:
        for entry in read_journal(JobDirectory.at(known.directory)):
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


def _sbatch(words: Sequence[str], script: str) -> str:
    """Return the job's number; of ``--test-only`` what it found."""
    from elastic_ckpt.cli.slurm.sbatch_options import environment_for_sbatch

    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *words], input=script, capture_output=True, text=True,
            timeout=_ANSWER_SECONDS, check=False, env=environment_for_sbatch(os.environ),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmRefused(f"sbatch: {error}: run this on a node of a SLURM cluster") from None
    said = printable(" ".join(done.stderr.split()))
    if done.returncode != 0:
        raise SlurmRefused(said or "sbatch failed")
    if "--test-only" in words:
        return said.removeprefix("sbatch: ")
    if said:
        click.echo(said, err=True)
    return done.stdout.strip().partition(";")[0]

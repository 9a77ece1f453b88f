"""What starts the job, stops it and gives it notice on this machine, and what follows from that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.cli.run.build_settings import signal_grace_seconds
from elastic_ckpt.cli.slurm.requeue import RUN_AGAIN
from elastic_ckpt.notices.platforms import make_sources
from elastic_ckpt.util.in_child import NoAnswer, WorkFailed, answer
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_duration

_AGAIN: Final = "75 and 76 mean: rerun the same command"
_LEAVES: Final = {
    "aws": "2 min as a rule",
    "gcp": "30 s",
    "azure": "30 s at the least",
}
"""What each cloud's notice leaves."""

_REACH: Final = {
    "aws": "let this host reach it; in a container that takes a hop limit of 2",
    "azure": "try again in two minutes, which it may take to begin; then let this host reach it",
}
_CLOUD_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Grace:
    """Seconds between a SIGTERM and the end, and who says so."""

    seconds: float
    source: str


def find_grace(given: float | None, platforms: Sequence[str]) -> Grace:
    """As ``run`` would have it.

    Raises:
        UsageError: what was given is no number.
    """
    seconds = signal_grace_seconds(given, platforms)
    if given is not None:
        return Grace(seconds, "as given")
    if "slurm" in platforms:
        return Grace(seconds, "as SLURM has it")
    return Grace(seconds, "the default; --grace says it for this machine")


def nodes(environ: Mapping[str, str] = os.environ) -> int:
    """How many nodes a job of SLURM has; 1 outside one."""
    number = environ.get("SLURM_JOB_NUM_NODES", "")
    return int(number) if number.isdecimal() else 1


def check_platform(
    platforms: Sequence[str],
    grace: Grace,
    environ: Mapping[str, str] = os.environ,
    booted: Path = Path("/run/systemd/system"),
) -> Iterator[Finding]:
    """Notices, their grace, systemd and SLURM.

    Args:
        platforms: names of those of this machine.
        booted: is there if systemd is the machine's first process.
    """
    yield from _notices(platforms)
    text = f"{human_duration(grace.seconds)} between a SIGTERM and the end, {grace.source}"
    yield ok("grace", text, grace.seconds, "seconds")
    yield _systemd(environ, booted)
    yield from _slurm("slurm" in platforms, environ)


def _notices(platforms: Sequence[str]) -> Iterator[Finding]:
    yield ok("notices", f"signals{''.join(f', {name}' for name in platforms)}")
    for name in platforms:
        if name in _LEAVES:
            yield _cloud(name)


def _cloud(name: str) -> Finding:
    try:
        answer(lambda: _ask(name), bool, _CLOUD_SECONDS)
    except (NoAnswer, WorkFailed) as error:
        todo = f"no notice would be heard but SIGTERM: {_REACH.get(name, 'let this host reach it')}"
        return Finding(name, "warning", f"its metadata service: {error}", todo)
    return ok(name, f"its metadata service answers; a notice leaves {_LEAVES[name]}")


def _ask(name: str) -> Generator[bool, None, None]:
    """Each source once, as a run does."""
    for source in make_sources([name]):
        try:
            for _ in source.poll():  # type: ignore[attr-defined]  # clouds are polled
                pass
        except Exception as error:  # whatever an answer holds
            raise OSError(0, printable(str(error) or type(error).__name__, 200)) from None
    yield True


def _systemd(environ: Mapping[str, str], booted: Path) -> Finding:
    if environ.get("NOTIFY_SOCKET"):
        return ok("systemd", "starts this, waits until it trains, and on a stop until it is saved")
    if environ.get("INVOCATION_ID"):
        return ok("systemd", "runs this below a unit: its TimeoutStopSec= must leave the grace")
    if booted.is_dir():
        return ok("systemd", "is there: as elastic-ckpt@NAME a job is started again by itself")
    return ok("systemd", f"is not there; for who starts the job, {_AGAIN}")


def _slurm(in_job: bool, environ: Mapping[str, str]) -> Iterator[Finding]:
    if not in_job:
        if shutil.which("sbatch"):
            yield ok("SLURM", "is there, and this is no job: elastic-ckpt slurm submit makes one")
        else:
            yield ok("SLURM", "is not there")
        return
    from elastic_ckpt.notices.slurm import SlurmUnanswered, job_id, requeue_exit_codes, show_job

    job = printable(job_id(environ))
    try:
        requeue = show_job(job).get("Requeue")
        by_code = requeue_exit_codes() >= RUN_AGAIN
    except SlurmUnanswered as error:
        todo = "see whether scontrol works here: what a SIGTERM leaves is not known without it"
        yield Finding("SLURM", "warning", f"job {job}: {printable(str(error))}", todo)
        return
    if by_code:
        yield ok("SLURM", f"job {job} is queued again on 75 and 76 by SLURM itself")
    elif requeue == "0":
        todo = "sbatch --requeue, or elastic-ckpt slurm submit"
        yield Finding("SLURM", "warning", f"job {job} may not be queued again", todo)
    else:
        yield ok("SLURM", f"job {job} may be queued again: its last line is the requeue-hook")

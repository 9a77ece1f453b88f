"""The platform: notices, their grace, systemd and SLURM."""

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
    "aws": "usually 2 min",
    "gcp": "30 s",
    "azure": "at least 30 s",
}
"""Time from a cloud's notice to the end of the node."""

_REACH: Final = {
    "aws": "make it reachable; a container needs a hop limit of 2",
    "azure": "retry in two minutes, since it may take that long to start; then make it reachable",
}
_CLOUD_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Grace:
    """Seconds from a SIGTERM to the end of the node, and where that value comes from."""

    seconds: float
    source: str


def find_grace(given: float | None, platforms: Sequence[str]) -> Grace:
    """Return the grace that ``run`` would use.

    Raises:
        UsageError: the given value is not finite.
    """
    seconds = signal_grace_seconds(given, platforms)
    if given is not None:
        return Grace(seconds, "from --grace")
    if "slurm" in platforms:
        return Grace(seconds, "from SLURM")
    return Grace(seconds, "the default; set it with --grace")


def nodes(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of nodes of the SLURM job; 1 outside one."""
    number = environ.get("SLURM_JOB_NUM_NODES", "")
    return int(number) if number.isdecimal() else 1


def check_platform(
    platforms: Sequence[str],
    grace: Grace,
    environ: Mapping[str, str] = os.environ,
    booted: Path = Path("/run/systemd/system"),
) -> Iterator[Finding]:
    """Check notices, their grace, systemd and SLURM.

    Args:
        platforms: the platforms of this machine.
        booted: exists if systemd is the init process.
    """
    yield from _notices(platforms)
    text = f"{human_duration(grace.seconds)} from a SIGTERM to the end, {grace.source}"
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
        todo = f"{_REACH.get(name, 'make it reachable')}; otherwise SIGTERM is the only notice"
        return Finding(name, "warning", f"metadata service: {error}", todo)
    return ok(name, f"metadata service answers; a notice leaves {_LEAVES[name]}")


def _ask(name: str) -> Generator[bool, None, None]:
    """Query each source once, as a run does."""
    for source in make_sources([name]):
        try:
            for _ in source.poll():  # type: ignore[attr-defined]  # clouds are polled
                pass
        except Exception as error:  # an answer may contain anything
            raise OSError(0, printable(str(error) or type(error).__name__, 200)) from None
    yield True


def _systemd(environ: Mapping[str, str], booted: Path) -> Finding:
    if environ.get("NOTIFY_SOCKET"):
        return ok(
            "systemd",
            "started this process; it waits for training to start, and on a stop for the save",
        )
    if environ.get("INVOCATION_ID"):
        return ok("systemd", "runs this in a unit, whose TimeoutStopSec= must allow the grace")
    if booted.is_dir():
        return ok("systemd", "available: elastic-ckpt@NAME restarts a job automatically")
    return ok("systemd", f"not running; for your own launcher, {_AGAIN}")


def _slurm(in_job: bool, environ: Mapping[str, str]) -> Iterator[Finding]:
    if not in_job:
        if shutil.which("sbatch"):
            yield ok(
                "SLURM",
                "available, but this is not a job: submit one with elastic-ckpt slurm submit",
            )
        else:
            yield ok("SLURM", "not installed")
        return
    from elastic_ckpt.notices.slurm import SlurmUnanswered, job_id, requeue_exit_codes, show_job

    job = printable(job_id(environ))
    try:
        requeue = show_job(job).get("Requeue")
        by_code = requeue_exit_codes() >= RUN_AGAIN
    except SlurmUnanswered as error:
        todo = "check that scontrol works here: without it the grace is unknown"
        yield Finding("SLURM", "warning", f"job {job}: {printable(str(error))}", todo)
        return
    if by_code:
        yield ok("SLURM", f"SLURM itself requeues job {job} on 75 and 76")
    elif requeue == "0":
        todo = "sbatch --requeue, or elastic-ckpt slurm submit"
        yield Finding("SLURM", "warning", f"job {job} cannot be requeued", todo)
    else:
        yield ok("SLURM", f"job {job} can be requeued, if its last line is the requeue-hook")

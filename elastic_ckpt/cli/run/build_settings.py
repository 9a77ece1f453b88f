"""From the options of ``run`` to checked settings."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.run.entry import find_file
from elastic_ckpt.cli.run.interpreter import find_python
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir import node_record as records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.notices.platforms import NONE, choose
from elastic_ckpt.policy.interval import DEFAULT_MTBF_SECONDS, SaveInterval, parse_interval
from elastic_ckpt.policy.own_saves import own_saves
from elastic_ckpt.policy.retention import Retention, parse_best
from elastic_ckpt.protocol.rendezvous import parse_nodes
from elastic_ckpt.util.http_server import parse_address

if TYPE_CHECKING:
    from elastic_ckpt.supervisor.settings import MirrorSettings, OnWarning, RunSettings

DEFAULT_GRACE_SECONDS: Final = 30.0

_COLOSSALAI_MODULES: Final = ("colossalai", "colossalai.booster", "colossalai.booster.plugin")


def build_settings(
    *,
    directory: Path | BucketUrl,
    local_dir: Path | None,
    name: str | None,
    nproc: str,
    nnodes: str | None,
    rdzv_endpoint: str | None,
    rdzv_timeout: float,
    start_from: str | None,
    grace: float | None,
    notice_source: tuple[str, ...],
    notice_file: Path | None,
    on_warning: OnWarning,
    acknowledge: bool,
    save_interval: str | None,
    mtbf: float | None,
    max_failures: int,
    hang_seconds: float,
    python: str | None,
    global_batch: int | None,
    preload: str | None,
    watch: tuple[str, ...],
    complete_when: str | None,
    on_notice: str | None,
    resume_args: tuple[str, ...],
    finished_when: str | None,
    keep_last: int,
    keep_every: int,
    keep_best: str | None,
    memory_dir: str,
    replicas: int,
    digests: int,
    domain: str | None,
    mirror: str | None,
    mirror_every: float | None,
    bucket_rate: float | None,
    metrics: str | None,
    metrics_file: Path | None,
    web: str | None,
    group_access: bool,
    node_name: str | None,
    script: str | None,
    module: str | None,
    args: tuple[str, ...],
    env: Mapping[str, str],
) -> RunSettings:
    """Check the options of ``run``, which give the arguments their names.

    Raises:
        UsageError: an option is invalid.
    """
    from elastic_ckpt.supervisor.metrics.exporter import check_file
    from elastic_ckpt.supervisor.settings import RunSettings

    workers_python = find_python(python) if python else ""
    file = find_file(script, module, workers_python)
    _refuse_contradictions(memory_dir, replicas, notice_file)
    if watch:
        of_sessions = {
            "--save-interval": save_interval, "--mtbf": mtbf, "--keep-best": keep_best,
            "--digests": digests, "--global-batch": global_batch,
        }  # fmt: skip
        _refuse_with_watch([option for option, value in of_sessions.items() if value])
    platforms = choose(notice_source)
    grace = signal_grace_seconds(grace, platforms)
    interval = parse_interval(save_interval) if save_interval else SaveInterval()
    nodes, endpoint = _nodes(nnodes, rdzv_endpoint, platforms)
    url = directory if isinstance(directory, BucketUrl) else None
    copies = _mirror(url, mirror, mirror_every, bucket_rate)
    if copies is not None:
        _refuse_with_bucket(copies, endpoint=endpoint, watch=watch, start_from=start_from)
    if isinstance(directory, BucketUrl):
        from elastic_ckpt.cli.run.bucket import local_directory

        directory = local_directory(directory, local_dir)
    elif local_dir is not None:
        raise UsageError("--local-dir goes with --dir URL: a directory is used where it is")
    JobDirectory(directory.resolve()).refuse_inner()
    root = JobDirectory.at(directory).root
    return RunSettings(
        directory=root,
        script=file.resolve(),
        module=module or "",
        args=args,
        env=env,
        name=name or (url.prefix.rpartition("/")[2] if url else root.name),
        node=records.node_name(node_name),
        nproc=_workers(nproc),
        start_from=start_from or "",
        grace=grace,
        interval=interval,
        mtbf=_mtbf(mtbf, interval),
        max_failures=max_failures,
        hang_seconds=hang_seconds,
        python=workers_python,
        global_batch=global_batch or 0,
        preload=modules_to_preload(preload, file, args),
        retention=make_retention(keep_last, keep_every, keep_best),
        group_access=group_access,
        memory=None if memory_dir == "off" else Path(memory_dir).absolute(),
        replicas=replicas,
        digests=digests,
        domain=os.environ.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[0]
        if domain is None
        else domain,
        nodes=nodes,
        endpoint=endpoint,
        gather_seconds=rdzv_timeout,
        notice_sources=platforms,
        notice_file=notice_file.absolute() if notice_file else None,
        on_warning=on_warning,
        acknowledge=acknowledge,
        mirror=copies,
        metrics=None if metrics is None else parse_address(metrics, "--metrics"),
        web=None if web is None else parse_address(web, "--web"),
        own=own_saves(
            watch=watch,
            complete_when=complete_when,
            on_notice=on_notice,
            resume_args=resume_args,
            finished_when=finished_when,
        ),
        metrics_file=None if metrics_file is None else check_file(metrics_file),
    )


def check_anywhere(**options: Any) -> None:
    """Check options that run on another machine, such as SLURM's: as :func:`build_settings`, but
    for what that machine alone knows.

    Raises:
        UsageError: an option is invalid.
    """
    endpoint, names = options["rdzv_endpoint"], options["notice_source"]
    several = options["nnodes"] is not None and parse_nodes(options["nnodes"])[1] > 1
    elsewhere = {
        "rdzv_endpoint": endpoint or ("the-head" if several else None),
        "notice_source": tuple(name for name in names if name != "slurm") or (NONE,),
    }
    build_settings(**options | elsewhere)


def _refuse_contradictions(memory_dir: str, replicas: int, notice_file: Path | None) -> None:
    if memory_dir == "off" and replicas > 1:
        raise UsageError(
            f"--replicas {replicas} keeps copies of what is in memory, and --memory-dir off leaves "
            "nothing there: leave one of them out"
        )
    if notice_file is not None and notice_file.exists() and not _is_readable(notice_file):
        raise UsageError(f"--notice-file {notice_file} is neither a file nor a FIFO")


def _refuse_with_watch(given: Sequence[str]) -> None:
    """Raise UsageError for options that would do nothing without a word."""
    if given:
        does, them = ("does", "it") if len(given) == 1 else ("do", "them")
        raise UsageError(
            f"{', '.join(given)} {does} nothing for checkpoints of --watch, which the script "
            f"writes itself, but for those of a Session: leave {them} out"
        )


def _is_readable(path: Path) -> bool:
    return path.is_file() or path.is_fifo()


def _mirror(
    place: BucketUrl | None, url: str | None, every: float | None, rate: float | None
) -> MirrorSettings | None:
    from elastic_ckpt.supervisor.settings import MirrorSettings

    if place is not None and url is not None:
        raise UsageError("--mirror is for a directory: --dir URL has everything in the bucket")
    url = url or (str(place) if place else None)
    if url is None:
        if every is not None or rate is not None:
            raise UsageError("--mirror-every and --bucket-rate need --mirror URL or --dir URL")
        return None
    return MirrorSettings(
        url=str(BucketUrl.parse(url)),
        every=every or 0.0,
        rate=rate or 0.0,
        is_place=place is not None,
    )


def _refuse_with_bucket(
    copies: MirrorSettings, *, endpoint: str, watch: Sequence[str], start_from: str | None
) -> None:
    """Raise UsageError for what would be lost with the machine without a word."""
    if watch:
        raise UsageError(
            "--watch: checkpoints that the script writes itself are not copied to a bucket: they "
            "lie outside the job directory; leave the bucket out, or save with a Session"
        )
    if copies.is_place and endpoint and (copies.every or copies.rate):
        raise UsageError(
            "--mirror-every and --bucket-rate: with --dir URL the ranks of several nodes upload "
            "each save themselves, at once; leave both out"
        )
    if copies.is_place and start_from:
        raise UsageError(
            f"--from goes with a directory: elastic-ckpt pull {copies.url} DIR, then elastic-ckpt "
            f"pull {copies.url} DIR {start_from}, then run --dir DIR --from {start_from} --mirror "
            f"{copies.url}"
        )


def make_retention(last: int, every: int, best: str | None) -> Retention:
    """Return the retention that the ``--keep-*`` options describe.

    Raises:
        UsageError: ``best`` is malformed.
    """
    count, metric, highest = parse_best(best) if best is not None else (0, "", False)
    return Retention(last=last, every=every, best=count, metric=metric, highest=highest)


def signal_grace_seconds(given: float | None, platforms: Sequence[str]) -> float:
    """Return the seconds from a signal to the end of the node: as given, SLURM's, or 30.

    Raises:
        UsageError: the given value is not finite.
    """
    if given is not None:
        if not math.isfinite(given):
            raise UsageError(f"invalid --grace {given}: give a number of seconds")
        return given
    if "slurm" in platforms:
        from elastic_ckpt.notices.slurm import signal_grace

        return signal_grace() or DEFAULT_GRACE_SECONDS
    return DEFAULT_GRACE_SECONDS


def _workers(nproc: str) -> int:
    if nproc == "auto":
        from elastic_ckpt.util.gpus import auto_workers

        return auto_workers()
    if not nproc.isdecimal() or int(nproc) < 1:
        raise UsageError(f"invalid --nproc {nproc!r}: give a positive number or auto")
    return int(nproc)


def _nodes(
    nnodes: str | None, endpoint: str | None, platforms: Sequence[str]
) -> tuple[tuple[int, int], str]:
    """Return the minimum and maximum number of nodes, and where they meet; empty for one node."""
    in_slurm = "slurm" in platforms
    if nnodes is None:
        nnodes = os.environ.get("SLURM_STEP_NUM_NODES", "1") if in_slurm else "1"
    least, most = parse_nodes(nnodes)
    if most > 1 and in_slurm:
        from elastic_ckpt.notices.slurm import head_endpoint, tasks_per_node

        if tasks_per_node() > 1:
            raise UsageError(
                f"srun started {tasks_per_node()} supervisors on a node: use srun "
                "--ntasks-per-node=1, since each starts its node's workers (--nproc)"
            )
        endpoint = endpoint or head_endpoint()
    if most > 1 and not endpoint:
        raise UsageError(
            f"--nnodes {nnodes} needs --hostfile FILE, or --rdzv-endpoint HOST:PORT with the "
            "address of one node, the same on every node"
        )
    return (least, most), endpoint or ""


def _mtbf(given: float | None, interval: SaveInterval) -> float:
    if given is not None and not interval.auto:
        raise UsageError("--mtbf requires --save-interval auto")
    return DEFAULT_MTBF_SECONDS if given is None else given


def missing_modules(settings: RunSettings) -> str:
    """Return which modules the template will not find, in one line; empty if it finds all."""
    if settings.python or "PYTHONPATH" in settings.env:  # the workers' path is another one
        return ""
    tops = {name: name.partition(".")[0] for name in settings.preload}
    missing = [name for name, top in tops.items() if not top.isidentifier() or not find_spec(top)]
    names = ", ".join(missing)
    return f"--preload {names}: not found, workers start without it" if missing else ""


def modules_to_preload(given: str | None, script: Path, args: Iterable[str]) -> tuple[str, ...]:
    """Return the modules to import ahead; by default ColossalAI's if the job names it."""
    if given is not None:
        return tuple(module.strip() for module in given.split(",") if module.strip())
    named = list(args)
    with contextlib.suppress(OSError):  # a module in an archive
        named.append(script.read_text(errors="replace"))
    uses = any(re.search(r"\bcolossalai\b", text) for text in named)
    return _COLOSSALAI_MODULES if uses else ()

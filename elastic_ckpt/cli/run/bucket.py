"""``run --dir URL``: the bucket is the job's place, and this machine has a copy to work on."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from elastic_ckpt.checkpoint.bucket.catalog import listed, newest, read_seal, sessions
from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.ownership import (
    BucketClaim,
    claim_after,
    identity_of,
    new_owner,
)
from elastic_ckpt.checkpoint.bucket.probe import probe
from elastic_ckpt.checkpoint.bucket.source import in_bucket, in_directory
from elastic_ckpt.checkpoint.bucket.store import Bucket
from elastic_ckpt.checkpoint.bucket.take import note_own, take, take_for, was_in_step
from elastic_ckpt.checkpoint.bucket.transfer import in_order, pull, push
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.catalog import newest_intact
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import Manifest
from elastic_ckpt.checkpoint.ownership.fence import count_from
from elastic_ckpt.checkpoint.ownership.job_lock import HeldLock, Patience
from elastic_ckpt.checkpoint.remote_note import forget_remote
from elastic_ckpt.cli.run.storage_check import ask
from elastic_ckpt.errors import CheckpointRejected, NoUsableCheckpoint
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.util.files import write_atomic
from elastic_ckpt.util.progress import in_lines


def local_directory(url: BucketUrl, given: Path | None = None) -> Path:
    """Return where this machine keeps its copy of a job: below ``given``, or the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    base = given or Path(home) / "elastic-ckpt"
    name = url.prefix.rpartition("/")[2]
    return base / f"{name}-{hashlib.sha256(str(url).encode()).hexdigest()[:12]}"


def take_bucket(
    settings: RunSettings, say: Callable[[str], None], leaves: Callable[[], bool]
) -> BucketClaim:
    """Own the job in its bucket, and bring its newest checkpoint to this machine's directory.

    What an earlier run of this machine left there is used if nobody has continued the job since;
    else the directory is moved aside and begun anew.

    Raises:
        BucketRefused, BucketFailed: the bucket cannot be used, or does not answer.
        LockHeld: the owner of the bucket, or of the directory, is alive.
        StopAborted: a signal came during the wait for the last owner, or for the checkpoint.
        NoUsableCheckpoint: there are checkpoints, but none is intact.
    """
    run_id = os.environ.get("SLURM_JOB_ID") or uuid.uuid4().hex[:12]
    job, store, patience = _opened(settings, say, leaves, run_id)
    with _locked(job, run_id):
        claim = take_for(job, store, new_owner(run_id, settings.node), patience)
        is_in_step = was_in_step(job, claim)
        forget_remote(job)
    try:
        if not is_in_step:
            _begin_anew(job, identity_of(store), say)
            with _locked(job, run_id):
                _bring(claim, job, patience)
        note_own(job, claim)
    except BaseException:
        with contextlib.suppress(OSError):
            claim.beat(ended=True)  # nobody needs to wait for it
        raise
    return claim


def succeed_in_bucket(settings: RunSettings, previous: int) -> BucketClaim:
    """Own the job in the bucket of several nodes after run ``previous``, whose lease this node has
    waited out; raises as :func:`take_bucket`, without a wait."""
    if settings.mirror is None:
        raise ValueError("the settings have no bucket")
    run_id = os.environ.get("SLURM_JOB_ID") or uuid.uuid4().hex[:12]
    job, store = JobDirectory(settings.directory), open_store(BucketUrl.parse(settings.mirror.url))
    claim = claim_after(store, previous, new_owner(run_id, settings.node, settings.endpoint))
    _count_on(claim, job, run_id)
    return claim.share(job)


def _count_on(claim: BucketClaim, job: JobDirectory, run_id: str) -> None:
    """Let this machine's run number be higher than those that the bucket's checkpoints have."""
    store = claim.store
    for seal in [newest(store, one, claim.newest) for one in sessions(store, claim.newest)]:
        with _locked(job, run_id), contextlib.suppress(CheckpointRejected):
            if seal is not None:
                count_from(job, read_seal(store, seal).run)


def share_bucket(
    settings: RunSettings, say: Callable[[str], None], leaves: Callable[[], bool]
) -> BucketClaim:
    """Own the job in its bucket, for nodes that share no directory: their ranks bring the newest
    checkpoint to each machine. Raises as :func:`take_bucket`.

    What an earlier run of this machine alone has here, and the bucket lacks, is copied there.
    """
    run_id = os.environ.get("SLURM_JOB_ID") or uuid.uuid4().hex[:12]
    job, store, patience = _opened(settings, say, leaves, run_id)
    with _locked(job, run_id):
        owner = new_owner(run_id, settings.node, settings.endpoint)
        claim = take(store, job.identity(), owner, patience)
        is_in_step = was_in_step(job, claim)
    try:
        if is_in_step:
            _push_rest(claim, job, patience)
        why = "the ranks of several nodes bring checkpoints here from the bucket"
        _begin_anew(job, identity_of(store), say, why)
        _count_on(claim, job, run_id)
    except BaseException:
        with contextlib.suppress(OSError):
            claim.beat(ended=True)  # nobody needs to wait for it
        raise
    return claim.share(job)


def _push_rest(claim: BucketClaim, job: JobDirectory, patience: Patience) -> None:
    for one in job.sessions():
        found, there = newest_intact(one), newest(claim.store, one.name, claim.newest)
        if found is None or not isinstance(found.manifest, Manifest):
            continue
        if there is None or there.attempt != found.manifest.attempt:
            patience.say(f"copying {found.shown} to {claim.store.url}, which lacks it")
            told = claim.beating(lambda _: patience.check(claim.store.url))
            push(claim, in_directory(found.path), found.manifest, told)


def _opened(
    settings: RunSettings, say: Callable[[str], None], leaves: Callable[[], bool], run_id: str
) -> tuple[JobDirectory, Bucket, Patience]:
    """Try the bucket out, and have a directory for that job here."""
    if settings.mirror is None:
        raise ValueError("the settings have no bucket")
    patience = Patience(say, leaves)
    store = open_store(BucketUrl.parse(settings.mirror.url), make=True)
    if failed := ask(lambda: probe(store), settings.mirror.url, patience):
        raise failed
    job = JobDirectory(settings.directory)
    job.prepare(group_access=settings.group_access)
    theirs = identity_of(store)
    with _locked(job, run_id):  # nobody works in it while it is looked at
        is_of_job = theirs in ("", job.identity())
    if not is_of_job:
        _begin_anew(job, theirs, say)
    return job, store, patience


@contextlib.contextmanager
def _locked(job: JobDirectory, run_id: str) -> Iterator[None]:
    lock = HeldLock(job.lock, run_id)
    try:
        yield
    finally:
        lock.release()


def _begin_anew(
    job: JobDirectory,
    identity: str,
    say: Callable[[str], None],
    why: str = "another machine has continued the job",
) -> None:
    """Move what is in the directory aside, if it has any checkpoint, and make it that job's."""
    if any(job.root.glob("epoch-*")) or job.sessions()[1:]:
        aside = job.root.with_name(f"{job.root.name}.{time.strftime('%Y%m%dT%H%M%S')}")
        os.rename(job.root, aside)
        say(f"{why}: what this one had is in {aside}")
        job.prepare()
    write_atomic(job.control / "identity", identity.encode())


def _bring(claim: BucketClaim, job: JobDirectory, patience: Patience) -> None:
    """Copy the newest intact checkpoint of each session into an empty directory."""
    for session in sessions(claim.store, claim.newest):
        every = [one.seal for one in listed(claim.store, session) if not one.superseded]
        first = newest(claim.store, session, claim.newest)
        seals = list(dict.fromkeys([*([first] if first else []), *every]))
        if seals and not any(
            _bring_one(claim, job.session(session), seal, patience) for seal in seals
        ):
            raise NoUsableCheckpoint(
                f"none of the {len(seals)} checkpoints in {claim.store.url} is intact: "
                f"elastic-ckpt verify --full {claim.store.url} looks at all"
            )


def _bring_one(claim: BucketClaim, place: JobDirectory, seal: SealKey, patience: Patience) -> bool:
    """Copy a checkpoint; False if it is damaged."""
    try:
        manifest = read_seal(claim.store, seal)
        show = in_lines(patience.say)(f"bringing {seal.name} here", manifest.total_bytes)

        def advance(count: int) -> None:
            patience.check(f"{seal.name} from {claim.store.url}")
            show(count)

        place.root.mkdir(parents=True, exist_ok=True)
        with in_bucket(claim.store, seal, in_order(manifest)) as source:
            pull(source, manifest, DiskTier(place), claim.beating(advance))
    except CheckpointRejected as error:
        patience.say(f"{seal.name} in {claim.store.url} is damaged: {error}; trying the one before")
        return False
    count_from(place, manifest.run)
    patience.say(f"{seal.name} is here, from {claim.store.url}")
    return True

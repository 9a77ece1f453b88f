"""This node's part of a job: it leads or follows, and may change that while the job runs.

Each role has a supervisor of its own, which a change replaces; process, agent and board stay.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from elastic_ckpt.checkpoint.ownership.job_lock import Patience, read_owner
from elastic_ckpt.checkpoint.ownership.leaders import leader_in, leader_of
from elastic_ckpt.errors import (
    DirectoryUnusable,
    ElasticCkptError,
    EndpointUnknown,
    LockHeld,
    StopAborted,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.notices.signals import is_held
from elastic_ckpt.policy.lease import BUCKET_HEAD_BEAT_SECONDS, HEAD_BEAT_SECONDS
from elastic_ckpt.protocol.rendezvous import (
    Rendezvous,
    address_of,
    is_same_endpoint,
    lead_towards,
    meet,
    parse_endpoint,
)
from elastic_ckpt.protocol.succession import Follow, Leader
from elastic_ckpt.util.units import human_duration

if TYPE_CHECKING:
    from elastic_ckpt.checkpoint.bucket.ownership import BucketClaim
    from elastic_ckpt.supervisor.handed import Handed
    from elastic_ckpt.supervisor.settings import RunSettings
    from elastic_ckpt.supervisor.supervisor import Supervisor

MISSED_BEATS: Final = 2.5
"""How many beats to wait for one of a head that leads elsewhere."""

_POLL_SECONDS: Final = 0.2
_NAME_SECONDS: Final = 1.0
"""Between two look-ups of a name that has no address yet."""


class NodeRun:
    """One ``elastic-ckpt run`` on one node: makes its supervisors, one after another."""

    def __init__(
        self,
        settings: RunSettings,
        say: Callable[[str], None],
        reread: Callable[[], RunSettings],
    ) -> None:
        """``say`` shows one line to the user; ``reread`` as in ``wiring.make_supervisor``."""
        self._settings = settings
        self._say = say
        self._reread = reread
        self._listen_fd = -1  # where the nodes meet, while this one leads
        self._head_address = ""  # its name may be gone by the time that this node takes its place
        self._leader = self._reader()

    def begin(self) -> Supervisor:
        """Return the first supervisor. It joins a head that leads elsewhere by now, whatever the
        endpoint says; raises as ``wiring.make_supervisor``."""
        settings = self._settings
        if not settings.endpoint:
            return self._make(settings, None, _claim(settings, self._say))
        found = self._meet()
        if isinstance(found, Leader):
            return self._follow(settings, found)
        self._head_address = address_of(settings.endpoint)
        try:
            self._listen_fd = found.listen_fd
            claim = _claim(settings, self._say) if found.leads else None
            return self._make(settings, found, claim)
        except LockHeld:
            self._stop_listening()
            head = self._head_elsewhere()  # it may have been faster
            if head is None:
                raise
            return self._follow(settings, head)

    def _meet(self) -> Rendezvous | Leader:
        """Return where the nodes meet, or the head that leads elsewhere.

        In Kubernetes a pod's name has no address before the pod has one, and none after it.
        """
        settings, waited = self._settings, False
        until = time.monotonic() + settings.gather_seconds
        limit = human_duration(settings.gather_seconds)
        while True:
            head = self._head_elsewhere()
            if head is not None:
                return head
            try:
                return meet(settings.endpoint, self._is_led)
            except EndpointUnknown as error:
                if "KUBERNETES_SERVICE_HOST" not in os.environ:
                    raise
                if time.monotonic() > until:
                    raise StopAborted(
                        f"{settings.endpoint} had no address for {limit}: see whether the pod of "
                        "that name is scheduled, then rerun the same command"
                    ) from error
                if not waited:
                    self._say(f"{settings.endpoint} has no address yet: waiting up to {limit}")
                waited = True
            Patience(self._say, is_held).check(f"the address of {settings.endpoint}")
            time.sleep(_NAME_SECONDS)

    def go_on(self, before: Supervisor) -> Supervisor:
        """Return the supervisor that continues for one which has ended, with ``goes_on`` set."""
        from elastic_ckpt.supervisor.handed import Handed

        self._stop_listening()
        settings, step, handed = before.settings, before.goes_on, Handed.of(before)
        assert step is not None
        if isinstance(step, Follow):
            return self._follow(settings, step.leader, handed)
        try:
            return self._lead(settings, step.leader, handed)
        except (DirectoryUnusable, OSError) as error:
            self._stop_listening()
            self._say(f"cannot take the place of {step.leader.node}: {error}")
            head = replace(step.leader, endpoint=settings.endpoint)
            return self._follow(settings, head, replace(handed, taken=None))

    def _lead(self, settings: RunSettings, before: Leader, handed: Handed) -> Supervisor:
        found, endpoint = lead_towards(settings.endpoint, self._head_address)
        self._listen_fd = found.listen_fd
        settings = replace(settings, endpoint=endpoint, start_from="")
        claim = None
        if settings.shared_url:
            from elastic_ckpt.cli.run.bucket import succeed_in_bucket

            claim = succeed_in_bucket(settings, before.number)
        return self._make(settings, found, claim, handed)

    def _follow(
        self, settings: RunSettings, head: Leader, handed: Handed | None = None
    ) -> Supervisor:
        if handed is None:
            self._say(f"{head.node} leads this job, at {head.endpoint}: joining it")
        settings = replace(settings, endpoint=head.endpoint, start_from="", started_others=False)
        return self._make(settings, Rendezvous(*parse_endpoint(head.endpoint)), None, handed)

    def _make(
        self,
        settings: RunSettings,
        rendezvous: Rendezvous | None,
        claim: BucketClaim | None,
        handed: Handed | None = None,
    ) -> Supervisor:
        from elastic_ckpt.supervisor.wiring import make_supervisor

        return make_supervisor(
            settings, self._say, self._reread, rendezvous, is_held, claim, handed
        )

    def _stop_listening(self) -> None:
        if self._listen_fd >= 0:
            os.close(self._listen_fd)
            self._listen_fd = -1

    def _is_led(self) -> bool:
        found = read_owner(JobDirectory(self._settings.directory).lock)
        return found is not None and found.owner.is_alive() is not False

    def _reader(self) -> Callable[[], Leader | None]:
        settings = self._settings
        if not settings.shared_url:
            return lambda: leader_of(JobDirectory(settings.directory))
        from elastic_ckpt.checkpoint.bucket.object_store import open_store
        from elastic_ckpt.checkpoint.bucket.url import BucketUrl

        return lambda: leader_in(open_store(BucketUrl.parse(settings.shared_url)))

    def _head_elsewhere(self) -> Leader | None:
        """Return the head of this job if it lives, and not where the endpoint says."""
        settings, first = self._settings, self._look()
        if first is None or first.ended or not first.endpoint:
            return None
        if is_same_endpoint(first.endpoint, settings.endpoint):
            return None
        beat = BUCKET_HEAD_BEAT_SECONDS if settings.shared_url else HEAD_BEAT_SECONDS
        patience, until = Patience(self._say, is_held), time.monotonic() + MISSED_BEATS * beat
        while time.monotonic() < until:
            patience.check(f"a beat of {first.node}")
            time.sleep(_POLL_SECONDS)
            found = self._look()
            if found is not None and found != first and not found.ended and found.endpoint:
                return found
        return None

    def _look(self) -> Leader | None:
        with contextlib.suppress(ElasticCkptError, OSError):
            return self._leader()
        return None


def _claim(settings: RunSettings, say: Callable[[str], None]) -> BucketClaim | None:
    """Own the bucket that is the job's place; None if a directory is."""
    if settings.mirror is None or not settings.mirror.is_place:
        return None
    from elastic_ckpt.cli.run.bucket import share_bucket, take_bucket

    take = share_bucket if settings.shared_url else take_bucket
    return take(settings, say, is_held)

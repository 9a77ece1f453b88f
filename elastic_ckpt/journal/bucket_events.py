"""The journal's events of the bucket tier; conventions as in ``events.py``."""

from __future__ import annotations

from elastic_ckpt.journal.events import Count, JournalEvent, Seconds


class Mirrored(JournalEvent, frozen=True, tag="mirrored"):
    """A checkpoint was copied to a bucket and sealed there; ``path`` is its URL. Of the bytes
    ``sent_bytes`` were not there yet; of the seconds ``paused_seconds`` were left to training or to
    ``--bucket-rate``."""

    path: str = ""
    step: Count | None = None
    bytes: Count = 0
    seconds: Seconds = 0.0
    sent_bytes: Count = 0
    paused_seconds: Seconds = 0.0


class MirrorFailed(JournalEvent, frozen=True, tag="mirror_failed"):
    """A checkpoint could not be copied to a bucket now, or the bucket is not used any more."""

    step: Count | None = None
    error: str = ""

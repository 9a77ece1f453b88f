"""What ``doctor`` tries on a bucket: whether it keeps what ownership rests on."""

from __future__ import annotations

import time
from collections.abc import Iterator

from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.probe import probe
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.errors import DirectoryUnusable, UsageError
from elastic_ckpt.util.units import human_duration


def check_bucket_url(url: BucketUrl) -> Iterator[Finding]:
    """Create, read, list and delete an object, and create it twice; bounded by the store's time
    limits."""
    began = time.monotonic()
    try:
        undeletable = probe(open_store(url, make=True))
    except (DirectoryUnusable, UsageError) as error:
        text, _, todo = str(error).partition("; ")
        yield Finding("bucket", "problem", text, todo)
        return
    seconds = time.monotonic() - began
    if undeletable:
        text, _, todo = undeletable.partition("; ")
        yield Finding("deletion", "warning", f"{text}: old checkpoints stay there", todo)
    yield ok("bucket", f"{url}: keeps conditions, lists and reads what was written")
    each = seconds / 5
    yield ok("requests", f"{human_duration(each)} each, of five", each, "seconds")

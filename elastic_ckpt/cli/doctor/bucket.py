"""What ``doctor`` tries on a bucket: whether it keeps what ownership rests on."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.probe import REQUESTS, probe
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.doctor.findings import Finding, ok
from elastic_ckpt.errors import DirectoryUnusable, UsageError
from elastic_ckpt.util.units import human_duration


def check_bucket_url(url: BucketUrl, say: Callable[[str], None]) -> Iterator[Finding]:
    """Create, read, list and delete an object, and create it twice; bounded by the store's time
    limits. ``say`` receives the progress."""
    began = time.monotonic()
    made = itertools.count()

    def report(what: str) -> None:
        done, seconds = next(made), time.monotonic() - began
        left = f", {seconds * (REQUESTS - done) / done:.0f} s left" if done else ""
        say(f"bucket: {100 * done // REQUESTS} %, {what}{left} ...")

    try:
        undeletable = probe(open_store(url, make=True), report)
    except (DirectoryUnusable, UsageError) as error:
        text, _, todo = str(error).partition("; ")
        yield Finding("bucket", "problem", text, todo)
        return
    seconds = time.monotonic() - began
    if undeletable:
        text, _, todo = undeletable.partition("; ")
        yield Finding("deletion", "warning", f"{text}: old checkpoints stay there", todo)
    yield ok("bucket", f"{url}: keeps conditions, lists and reads what was written")
    each = seconds / REQUESTS
    yield ok("requests", f"{human_duration(each)} each, of five", each, "seconds")

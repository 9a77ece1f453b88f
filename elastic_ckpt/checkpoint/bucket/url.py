"""The URL of a job in an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from elastic_ckpt.errors import UsageError

SCHEMES: Final = ("s3", "gs", "az", "file")
"""``file`` is a directory that is used as a store: to try things out."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_PLACE = re.compile(r"[A-Za-z0-9!_.*'()/=@+-]+")


@dataclass(frozen=True)
class BucketUrl:
    """Where a job lies in an object store.

    Attributes:
        bucket: the bucket, or Azure's container; empty for ``file``.
        prefix: of all its keys, without slashes at its ends; an absolute path for ``file``.
    """

    scheme: str
    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> BucketUrl:
        """Parse ``s3://bucket/prefix``; UsageError with the reason."""
        match = _URL.fullmatch(text.strip())
        if match is None or match[1] not in SCHEMES:
            raise UsageError(
                f"{text!r} is not the URL of a bucket: it begins with s3://, gs:// or az://"
            )
        scheme, place = match[1], match[2]
        if not _PLACE.fullmatch(place) or any(part in (".", "..") for part in place.split("/")):
            raise UsageError(f"{text!r} holds characters that no key of a job may have")
        if scheme == "file":
            if not place.startswith("/"):
                raise UsageError(f"{text!r} needs an absolute path: file:///path")
            return cls(scheme, "", str(Path(place)))
        bucket, _, prefix = place.partition("/")
        prefix = "/".join(filter(None, prefix.split("/")))
        if not bucket:
            raise UsageError(f"{text!r} names no bucket")
        if not prefix:
            raise UsageError(f"{text!r} needs a prefix of the job's own: {scheme}://{bucket}/JOB")
        return cls(scheme, bucket, prefix)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}{'/' if self.bucket else ''}{self.prefix}"


def is_url(text: str) -> bool:
    """Return whether a user means an object store, and no path."""
    return _URL.fullmatch(text.strip()) is not None

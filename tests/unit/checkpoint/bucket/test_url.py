"""URLs of buckets: what is one, and what could lead elsewhere."""

from __future__ import annotations

import pytest

from elastic_ckpt.checkpoint.bucket.url import BucketUrl, is_url
from elastic_ckpt.errors import UsageError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/job", "s3://bucket/job"),
        ("gs://bucket/a/b/", "gs://bucket/a/b"),
        ("az://container//job", "az://container/job"),
        ("file:///tmp/store", "file:///tmp/store"),
    ],
)
def test_what_is_one(text: str, shown: str) -> None:
    assert str(BucketUrl.parse(text)) == shown
    assert BucketUrl.parse(shown) == BucketUrl.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("s3://bucket", "needs a prefix of the job's own"),
        ("s3://bucket/", "needs a prefix"),
        ("s3:///job", "names no bucket"),
        ("s3://bucket/../other", "characters that no key"),
        ("s3://bucket/a\nb", "characters that no key"),
        ("s3://bucket/a?x=1", "characters that no key"),
        ("http://bucket/job", "is not the URL of a bucket"),
        ("file://here", "needs an absolute path"),
        ("/a/path", "is not the URL of a bucket"),
    ],
)
def test_what_is_none(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        BucketUrl.parse(text)


def test_a_path_is_not_taken_for_one() -> None:
    assert not any(map(is_url, ("ckpt", "/a/b", "./s3", "C:/x", "a:b")))
    assert is_url("s3://x")
    assert is_url("http://x")  # refused with a line, not made a directory

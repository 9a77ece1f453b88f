"""What stores say, as they say it, and what it means."""

from __future__ import annotations

import pytest

from elastic_ckpt.checkpoint.bucket.failures import (
    FINAL,
    BucketFailure,
    advice,
    classify,
)

S3 = "<Error><Code>{}</Code><Message>...</Message></Error>"
TABLE = [
    ("GenericError", S3.format("SlowDown"), BucketFailure.THROTTLED),
    ("GenericError", "Server error: 503 Service Unavailable", BucketFailure.THROTTLED),
    ("GenericError", "429 Too Many Requests", BucketFailure.THROTTLED),
    ("GenericError", '"reason": "rateLimitExceeded"', BucketFailure.THROTTLED),
    ("GenericError", "HTTP error: error sending request", BucketFailure.NO_ANSWER),
    ("GenericError", "operation timed out", BucketFailure.NO_ANSWER),
    ("GenericError", "Server returned 500 Internal Server Error", BucketFailure.NO_ANSWER),
    ("GenericError", S3.format("RequestTimeout"), BucketFailure.NO_ANSWER),
    ("GenericError", S3.format("ExpiredToken"), BucketFailure.EXPIRED),
    ("UnauthenticatedError", "<Code>AuthenticationExpired</Code>", BucketFailure.EXPIRED),
    ("PermissionDeniedError", S3.format("RequestTimeTooSkewed"), BucketFailure.SKEW),
    ("PermissionDeniedError", S3.format("AccessDenied"), BucketFailure.DENIED),
    ("PermissionDeniedError", "AuthorizationPermissionMismatch", BucketFailure.DENIED),
    ("PermissionDeniedError", "", BucketFailure.DENIED),
    ("PermissionDeniedError", S3.format("SignatureDoesNotMatch"), BucketFailure.NO_CREDENTIALS),
    ("PermissionDeniedError", S3.format("InvalidAccessKeyId"), BucketFailure.NO_CREDENTIALS),
    ("UnauthenticatedError", "", BucketFailure.NO_CREDENTIALS),
    ("GenericError", "GET http://169.254.169.254/latest/api/token", BucketFailure.NO_CREDENTIALS),
    ("FileNotFoundError", S3.format("NoSuchBucket"), BucketFailure.NO_BUCKET),
    ("FileNotFoundError", "<Code>ContainerNotFound</Code>", BucketFailure.NO_BUCKET),
    ("FileNotFoundError", "The specified bucket does not exist.", BucketFailure.NO_BUCKET),
    ("GenericError", S3.format("BadDigest"), BucketFailure.CHECKSUM),
    ("GenericError", S3.format("XAmzContentSHA256Mismatch"), BucketFailure.CHECKSUM),
    ("GenericError", "retentionPolicyNotMet", BucketFailure.LOCKED),
    ("GenericError", "BlobImmutableDueToPolicy", BucketFailure.LOCKED),
    ("GenericError", S3.format("NotImplemented"), BucketFailure.NO_CONDITIONS),
    ("NotSupportedError", "", BucketFailure.NO_CONDITIONS),
    ("GenericError", "something new", BucketFailure.OTHER),
    ("GenericError", "retries: 0, retry_timeout: 60s, status: 418", BucketFailure.OTHER),
    (
        "GenericError",
        "Error performing GET http://h:503/b/503/connection - 418",
        BucketFailure.OTHER,
    ),
    ("GenericError", "Error performing PUT x in 503.403µs - code: 418", BucketFailure.OTHER),
    ("GenericError", "Error performing PUT x in 1.502ms - code: 418", BucketFailure.OTHER),
    (
        "UnauthenticatedError",
        "necessary privileges for path run-503/x: ",
        BucketFailure.NO_CREDENTIALS,
    ),
]


@pytest.mark.parametrize(("kind", "text", "expected"), TABLE)
def test_the_table(kind: str, text: str, expected: BucketFailure) -> None:
    assert classify(kind, text) is expected


def test_each_failure_has_an_advice_and_only_lasting_ones_refuse_a_start() -> None:
    assert all(advice(failure) for failure in BucketFailure)
    tried_again = {failure for failure in BucketFailure if "again" in advice(failure)}
    assert not FINAL & tried_again
    assert BucketFailure.EXPIRED not in FINAL

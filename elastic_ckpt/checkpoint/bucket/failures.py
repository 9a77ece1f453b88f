"""What a failed request to an object store means: pure, so that a table can test it."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final


class BucketFailure(Enum):
    """Why a request failed; the value is for people."""

    THROTTLED = "it asks for fewer requests"
    NO_ANSWER = "it does not answer"
    EXPIRED = "the credentials have expired"
    NO_CREDENTIALS = "no credentials were found, or they are wrong"
    DENIED = "the credentials do not permit this"
    NO_BUCKET = "there is no such bucket"
    SKEW = "this machine's clock differs too much from the store's"
    CHECKSUM = "what arrived is not what was sent"
    LOCKED = "an object lock or a retention rule of the bucket forbids it"
    NO_CONDITIONS = "it ignores conditions, so that two runs could own the job"
    OTHER = "it failed"


FINAL: Final = frozenset(
    {
        BucketFailure.NO_CREDENTIALS, BucketFailure.DENIED, BucketFailure.NO_BUCKET,
        BucketFailure.NO_CONDITIONS,
    }
)  # fmt: skip
"""A run that needs the bucket is refused at its start; nothing will change by itself."""

_CODES: Final = {
    BucketFailure.EXPIRED: r"ExpiredToken|TokenRefreshRequired|AuthenticationExpired"
    r"|token (has|is) expired",
    BucketFailure.SKEW: r"RequestTimeTooSkewed|RequestExpired|Signature not yet current",
    BucketFailure.NO_BUCKET: r"NoSuchBucket|ContainerNotFound|specified bucket does not exist",
    BucketFailure.CHECKSUM: r"BadDigest|InvalidDigest|XAmzContent\w*Mismatch|Md5Mismatch|checksum",
    BucketFailure.LOCKED: r"ObjectLock|BlobImmutableDueToPolicy|retentionPolicyNotMet"
    r"|under legal hold|InvalidObjectState",
    BucketFailure.NO_CREDENTIALS: r"InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken"
    r"|AuthenticationFailed|401 Unauthorized|Missing\w*Credential|Unable to load credentials"
    r"|instance metadata|metadata/identity|169\.254\.169\.254|metadata\.google\.internal",
    BucketFailure.THROTTLED: r"SlowDown|TooManyRequests|RequestLimitExceeded|ServerBusy|\b429\b"
    r"|\b503\b|rateLimitExceeded",
    BucketFailure.DENIED: r"AccessDenied|AuthorizationPermissionMismatch|\b403\b|AllAccessDisabled",
    BucketFailure.NO_CONDITIONS: r"NotImplemented|\b501\b|UnsupportedHeader",
    BucketFailure.NO_ANSWER: r"timed? ?out|Connect\b|connection|error sending request"
    r"|\b50[024]\b|InternalError|RequestTimeout|dns error|error decoding response",
}
"""What S3, GCS and Azure write into their answers; the first that fits counts."""

_KINDS: Final = {
    "UnauthenticatedError": BucketFailure.NO_CREDENTIALS,
    "PermissionDeniedError": BucketFailure.DENIED,
    "NotSupportedError": BucketFailure.NO_CONDITIONS,
}

_OURS: Final = re.compile(
    r"retry_timeout: \S+|(?:location|path:?) \S+|https?://(?!169\.254\.|metadata)\S+"
    r"|\b[\d.]+(?:ns|µs|ms|s)\b"
)
"""What obstore adds of its own: a URL, a key or a duration may look like any of the above."""


def classify(kind: str, text: str) -> BucketFailure:
    """Return why a request failed.

    Args:
        kind: name of the exception's type in obstore.
        text: its message, which holds the store's answer.
    """
    text = _OURS.sub("", text)
    for failure, pattern in _CODES.items():
        if re.search(pattern, text, re.IGNORECASE):
            return failure
    return _KINDS.get(kind, BucketFailure.OTHER)


def advice(failure: BucketFailure) -> str:
    """Return what a person should do, as the end of a line."""
    return {
        BucketFailure.EXPIRED: "renew them; they are read again at each try",
        BucketFailure.NO_CREDENTIALS: "set them up as docs/bucket.md says",
        BucketFailure.DENIED: "permit get, put, list and delete below the URL",
        BucketFailure.NO_BUCKET: "create it, or correct the URL or the endpoint",
        BucketFailure.SKEW: "set the clock of this machine",
        BucketFailure.LOCKED: "exclude the job's prefix from that rule",
        BucketFailure.NO_CONDITIONS: "use a store that keeps If-None-Match on PUT",
    }.get(failure, "it is tried again")

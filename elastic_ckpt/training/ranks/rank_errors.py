"""Errors that travel between ranks: a rank's error becomes the same error on every rank."""

from __future__ import annotations

from elastic_ckpt.errors import (
    BucketFailed,
    BucketRefused,
    ElasticCkptError,
    LeaderLost,
    SaveFailed,
    StorageFailed,
)


def describe(error: BaseException) -> str:
    """Describe an exception in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}" + (f": {error.filename}" if error.filename else "")
    text = [line for line in str(error).strip().splitlines() if line.strip()]
    if not text:
        return type(error).__name__
    # A child's error, as of mp.spawn or a DataLoader, ends with what it raised.
    last = f" {text[-1]}" if any(line.startswith("Traceback (most recent") for line in text) else ""
    return f"{type(error).__name__}: {text[0]}{last}"


def as_failure(rank: int, error: Exception, doing: str) -> ElasticCkptError:
    """Return what every rank raises because this one raised ``error``."""
    if isinstance(error, (BucketFailed, BucketRefused)):  # the storage's, as an OSError is a disk's
        return StorageFailed(rank, str(error), doing)
    if isinstance(error, ElasticCkptError):
        return error
    stored = isinstance(error, OSError) and not isinstance(error, ConnectionError)
    return (StorageFailed if stored else SaveFailed)(rank, describe(error), doing)


def encode_failure(failed: ElasticCkptError, rank: int) -> bytes:
    """Encode an error's class, and what reconstructs it."""
    doing, reason = "", str(failed)
    if isinstance(failed, SaveFailed):
        rank, doing, reason = failed.rank, failed.doing, failed.reason
    return f"{type(failed).__name__}:{rank}:{doing}:{reason}".encode()


def decode_failure(value: bytes) -> ElasticCkptError:
    """Reconstruct an error from what a rank posted: a mark, and the encoded error."""
    kind, rank, doing, reason = bytes(value)[1:].decode(errors="replace").split(":", 3)
    found = _error_class(kind)
    if issubclass(found, SaveFailed):
        return found(int(rank), reason, doing)
    return found(reason)


def leader_lost(error: BaseException) -> LeaderLost:
    """Return the error for a job's store that fails with ``error``."""
    return LeaderLost(0, f"lost the job's store, and so the leader: {describe(error)}")


def _error_class(name: str) -> type[ElasticCkptError]:
    known = {ElasticCkptError.__name__: ElasticCkptError}
    pending = [ElasticCkptError]
    while pending:
        for kind in pending.pop().__subclasses__():
            known[kind.__name__] = kind
            pending.append(kind)
    return known.get(name, ElasticCkptError)

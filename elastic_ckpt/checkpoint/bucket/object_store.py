"""The object stores of S3, GCS and Azure, and a directory in their place, through obstore.

Credentials, signatures, retries with back-off, multipart and connections are obstore's.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from elastic_ckpt.checkpoint.bucket.aws_profile import read_profile
from elastic_ckpt.checkpoint.bucket.failures import FINAL, BucketFailure, advice, classify
from elastic_ckpt.checkpoint.bucket.store import Bucket, StoredObject
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.errors import BucketFailed, BucketRefused, UsageError
from elastic_ckpt.util.text import printable

if TYPE_CHECKING:
    from obstore.store import ObjectStore

CHUNK_BYTES: Final = 16 * 1024 * 1024
"""Of one part of a large object."""

SHARED_CHUNK_BYTES: Final = 6 * 1024 * 1024
"""The same where more than ``MANY_SHARERS`` processes of a machine upload at the same time; S3
takes no less than 5 MiB."""

MANY_SHARERS: Final = 4

MOST_PARTS: Final = 9_900
"""Of one object; S3 takes 10,000. The parts of larger objects are larger."""

UPLOADS: Final = 4
"""Parts of one object that are under way at once, at most."""

AHEAD_PARTS: Final = 2
"""Further parts of one object in memory: one that is read, and one that is handed over."""

PARTS: Final = 2 * (UPLOADS + AHEAD_PARTS)
"""Parts in memory on one machine, whose processes share them: 200 MB. Each has at least one under
way, smaller ones where there are many: eight processes take 150 MB."""

LIST_PAGE: Final = 1000

_REQUEST: Final = {"timeout": "60s", "connect_timeout": "5s"}
_RETRIES: Final[Any] = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}


def open_store(url: BucketUrl, *, make: bool = False, sharers: int = 1) -> Bucket:
    """Return the store at a URL; makes no request.

    Args:
        make: make the directory of a ``file`` if it is missing; other buckets are their owner's to
            make.
        sharers: processes of this machine that upload at the same time.

    Raises:
        UsageError: the extra is not installed, or the platform's settings are incomplete.
    """
    try:
        import obstore.store
    except ImportError:
        raise UsageError(
            f"{url} needs the extra: pip install 'elastic-ckpt[bucket]', or start without a bucket"
        ) from None
    try:
        if url.scheme == "file" and not make and not Path(url.prefix).is_dir():
            raise BucketRefused(f"cannot use {url}: there is no such directory")
        if url.scheme == "file":
            return BucketStore(url, obstore.store.LocalStore(url.prefix, mkdir=make), sharers)
        return BucketStore(url, obstore.store.from_url(str(url), **_options(url)), sharers)
    except (BucketRefused, UsageError):
        raise
    except OSError as error:
        raise BucketRefused(f"cannot use {url}: {error.strerror or error}") from None
    except Exception as error:  # obstore raises types of its own for settings that it cannot use
        raise UsageError(f"cannot use {url}: {_first_line(error)}") from None


def _options(url: BucketUrl) -> dict[str, Any]:
    """Return what obstore does not find by itself; UsageError for an AWS profile of no use."""
    client: dict[str, Any] = dict(_REQUEST)
    options: dict[str, Any] = {"client_options": client, "retry_config": _RETRIES}
    if url.scheme != "s3":
        return options
    profile = read_profile()
    config = {"checksum_algorithm": "SHA256"}
    given = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    if endpoint := given or profile.endpoint:
        config["endpoint"] = endpoint
    if endpoint.startswith("http://"):
        client["allow_http"] = True  # a store in one's own network; the user wrote http://
    if profile.region and not any(map(os.environ.get, ("AWS_REGION", "AWS_DEFAULT_REGION"))):
        config["region"] = profile.region
    if profile.credentials is not None:
        options["credential_provider"] = profile.credentials
    return {**options, "config": config}


class BucketStore:
    """See :class:`elastic_ckpt.checkpoint.bucket.store.Bucket`; ``plain`` is obstore's own."""

    def __init__(self, url: BucketUrl, store: ObjectStore, sharers: int = 1) -> None:
        self.url = str(url)
        self.plain = store
        self._bucket = url.bucket or url.prefix
        self._is_directory = url.scheme == "file"
        parts = max(1 + AHEAD_PARTS, PARTS // sharers)
        self._uploads = min(UPLOADS, parts - AHEAD_PARTS)
        self._objects = threading.Semaphore(parts // (self._uploads + AHEAD_PARTS))
        self._chunk_bytes = CHUNK_BYTES if sharers <= MANY_SHARERS else SHARED_CHUNK_BYTES

    def get(self, key: str, limit: int) -> bytes:
        import obstore

        with self._asking(f"read {key}"):
            found = obstore.get(self.plain, key)
            if found.meta["size"] > limit:
                raise BucketFailed(f"{key} in {self.url} has more than {limit} bytes", errno.EFBIG)
            return bytes(found.bytes())

    def get_range(self, key: str, start: int, length: int) -> memoryview:
        import obstore

        with self._asking(f"read {key}"):
            return memoryview(obstore.get_range(self.plain, key, start=start, length=length))

    def put(self, key: str, data: bytes) -> None:
        import obstore

        with self._asking(f"write {key}", needs_object=False):
            obstore.put(self.plain, key, data, use_multipart=False)

    def put_new(self, key: str, data: bytes) -> None:
        import obstore

        with self._asking(f"create {key}", needs_object=False):
            obstore.put(self.plain, key, data, mode="create", use_multipart=False)

    def upload(self, key: str, chunks: Iterable[memoryview], size: int = 0) -> None:
        import obstore

        chunk_bytes = max(self._chunk_bytes, -(-size // MOST_PARTS))
        source = _Source(chunks)
        try:
            with self._objects, self._asking(f"write {key}", needs_object=False):
                obstore.put(
                    self.plain, key, source, use_multipart=True, chunk_size=chunk_bytes,
                    max_concurrency=self._uploads,
                )  # fmt: skip
        except Exception:
            if source.error is not None:
                raise source.error from None
            raise
        finally:
            _give_back_memory()

    def listing(self, prefix: str) -> Iterator[list[StoredObject]]:
        if self._is_directory:
            yield sorted(one for page in self._pages(prefix) for one in page)
            return
        last = ""
        for page in self._pages(prefix):
            for one in page:
                if one.key < last:  # S3's directory buckets do that
                    raise BucketRefused(
                        f"cannot use {self.url}: it does not list keys in their order; use a store "
                        "that does"
                    )
                last = one.key
            yield page

    def _pages(self, prefix: str) -> Iterator[list[StoredObject]]:
        import obstore

        with self._asking(f"list {prefix}", needs_object=self._is_directory):
            for page in obstore.list(self.plain, prefix, chunk_size=LIST_PAGE):
                yield [
                    StoredObject(one["path"], one["size"], one["last_modified"].timestamp())
                    for one in page
                ]

    def delete(self, keys: list[str]) -> None:
        for first in range(0, len(keys), LIST_PAGE):
            some = keys[first : first + LIST_PAGE]
            try:
                self._delete(some)
            except FileNotFoundError:  # GCS and Azure say so of one, and leave the others
                for key in some:
                    with contextlib.suppress(FileNotFoundError):
                        self._delete([key])

    def _delete(self, keys: list[str]) -> None:
        import obstore

        with self._asking("delete objects"):
            obstore.delete(self.plain, keys)

    @contextlib.contextmanager
    def _asking(self, doing: str, *, needs_object: bool = True) -> Iterator[None]:
        """Raise what the block's request failed of.

        Args:
            needs_object: a 404 means that there is no such object. Else it can mean the bucket
                only: BucketFailed with ENOENT, as a gateway whose servers are away says so, too.
        """
        from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

        try:
            yield
        except (AlreadyExistsError, PreconditionError):
            raise FileExistsError(errno.EEXIST, "the object is there already", self.url) from None
        except (FileNotFoundError, BaseError, TimeoutError) as error:
            raise self._meaning(error, doing, needs_object=needs_object) from None

    def _meaning(self, error: Exception, doing: str, *, needs_object: bool) -> Exception:
        text = str(error)
        failure = classify(type(error).__name__, text)
        is_404 = isinstance(error, FileNotFoundError) or (
            failure is BucketFailure.OTHER and "status code: 404" in text  # of a listing
        )
        if not is_404 or failure is BucketFailure.NO_BUCKET or "NoSuchUpload" in text:
            return self._error(failure, doing, error)
        if needs_object:
            return FileNotFoundError(errno.ENOENT, "there is no such object", self.url)
        return BucketFailed(self._line(BucketFailure.NO_BUCKET, doing, error), errno.ENOENT)

    def _error(self, failure: BucketFailure, doing: str, error: Exception) -> Exception:
        line = self._line(failure, doing, error)
        if failure in FINAL:
            return BucketRefused(line)
        return BucketFailed(line)

    def _line(self, failure: BucketFailure, doing: str, error: Exception) -> str:
        why = failure.value
        if failure is BucketFailure.NO_BUCKET:
            why = f"there is no bucket {self._bucket!r}"
        line = f"cannot {doing} in {self.url}: {why}; {advice(failure)}"
        if failure in (BucketFailure.OTHER, BucketFailure.NO_ANSWER):
            line += f" ({_first_line(error)})"
        return line


def _give_back_memory() -> None:
    """Return the buffers of an upload to the kernel: glibc keeps some 70 MB for each thread that
    has uploaded a large object. Other C libraries may have no such call."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _Source:
    """Hands chunks to obstore, which would hide what they raise."""

    def __init__(self, chunks: Iterable[memoryview]) -> None:
        self._chunks = iter(chunks)
        self.error: Exception | None = None

    def __iter__(self) -> _Source:
        return self

    def __next__(self) -> memoryview:
        try:
            return next(self._chunks)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


def _first_line(error: Exception) -> str:
    return printable(str(error).splitlines()[0] if str(error) else type(error).__name__, 300)

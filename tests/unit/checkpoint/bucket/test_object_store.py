"""What the answers of a server become, from a server that gives the same one to all requests."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import obstore
import pytest

from elastic_ckpt.checkpoint.bucket.object_store import AHEAD_PARTS, MOST_PARTS, open_store
from elastic_ckpt.checkpoint.bucket.probe import probe
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.run.storage_check import check_bucket
from elastic_ckpt.errors import BucketFailed, BucketRefused, CheckpointRejected
from tests.s3 import environment_of

URL = "s3://missing/job"


class Answering:
    """A server on loopback; each request gets ``status`` and ``body``."""

    def __init__(self) -> None:
        self.status, self.body = 404, b""
        answering = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response_only(answering.status)
                self.send_header("Content-Length", str(len(answering.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answering.body)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(30)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Answering]:
    made = Answering()
    for name, value in environment_of(made.endpoint).items():
        monkeypatch.setenv(name, value)
    yield made
    made.stop()


@pytest.mark.parametrize("body", [b"", b"404 page not found", b"<html>Not Found</html>"])
def test_a_404_without_a_code_to_a_write_means_the_bucket(server: Answering, body: bytes) -> None:
    server.body = body
    store = open_store(BucketUrl.parse(URL))
    with pytest.raises(BucketRefused, match="there is no bucket 'missing'; create it, or correct"):
        probe(store)
    for ask in (
        lambda: store.put("x", b""),
        lambda: store.upload("x", [memoryview(b"x")]),
        lambda: list(store.listing("runs/")),
    ):
        with pytest.raises(BucketFailed, match="there is no bucket 'missing'") as failed:
            ask()
        assert failed.value.errno == errno.ENOENT  # a gateway says so too: it is tried again
    with pytest.raises(FileNotFoundError):
        store.get("job.json", 10)


def test_a_mirror_is_refused_at_the_start(server: Answering, tmp_path: Path) -> None:
    with pytest.raises(BucketRefused, match="there is no bucket 'missing'") as refused:
        check_bucket(tmp_path / "job", URL)
    assert refused.value.exit_code == 73


def test_an_upload_that_a_rule_has_aborted_is_tried_again(server: Answering) -> None:
    server.body = b"<Error><Code>NoSuchUpload</Code></Error>"
    with pytest.raises(BucketFailed, match="it is tried again"):
        open_store(BucketUrl.parse(URL)).upload("x", [memoryview(b"x")])


@pytest.mark.parametrize("sharers", [1, 2, 3, 4, 5, 8])
def test_what_a_machine_uploads_at_once_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharers: int
) -> None:
    """Each process of a machine that has so many, on a machine with cores for all its files."""
    now, most = [0], [0]
    lock = threading.Lock()
    real = obstore.put

    def put(*arguments: Any, max_concurrency: int, chunk_size: int, **more: Any) -> Any:
        taken = (max_concurrency + AHEAD_PARTS) * chunk_size
        with lock:
            now[0] += taken
            most[0] = max(most[0], now[0])
        try:
            time.sleep(0.02)
            return real(*arguments, max_concurrency=max_concurrency, chunk_size=chunk_size, **more)
        finally:
            with lock:
                now[0] -= taken

    monkeypatch.setattr(obstore, "put", put)
    store = open_store(BucketUrl.parse(f"file://{tmp_path}/store"), make=True, sharers=sharers)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: store.upload(key, [memoryview(b"x")]), "abcdefgh"))
    assert 0 < sharers * most[0] <= 256 * 2**20
    assert store.get("h", 10) == b"x"


@pytest.mark.parametrize("sharers", [1, 8])
@pytest.mark.parametrize("size", [0, 10**9, 8 * 10**10, 4 * 10**12])
def test_an_object_has_no_more_parts_than_a_store_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharers: int, size: int
) -> None:
    chunks: list[int] = []
    monkeypatch.setattr(obstore, "put", lambda *_, chunk_size, **more: chunks.append(chunk_size))
    store = open_store(BucketUrl.parse(f"file://{tmp_path}/store"), make=True, sharers=sharers)
    store.upload("x", [], size)
    assert MOST_PARTS * chunks[0] >= size and chunks[0] >= 5 * 2**20  # the least that S3 takes


def test_an_upload_that_failed_makes_room_for_the_next(tmp_path: Path) -> None:
    def failing() -> Iterator[memoryview]:
        raise CheckpointRejected("it does not match")
        yield

    store = open_store(BucketUrl.parse(f"file://{tmp_path}/store"), make=True, sharers=8)
    for _ in range(5):
        with pytest.raises(CheckpointRejected):
            store.upload("x", failing())
    store.upload("x", [memoryview(b"x")])


def test_deleting_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    """As Azure has it, a directory stops at the first one that is missing."""
    store = open_store(BucketUrl.parse(f"file://{tmp_path}/store"), make=True)
    for name in ("a/1", "a/2"):
        store.put(name, b"")
    store.delete(["a/0", "a/1", "a/missing", "a/2"])
    assert not [one for page in store.listing("a/") for one in page]

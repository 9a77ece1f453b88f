"""What the answers of a server become, from a server that gives the same one to all requests."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.probe import probe
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.cli.run.storage_check import check_bucket
from elastic_ckpt.errors import BucketFailed, BucketRefused
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


def test_deleting_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    """As Azure has it, a directory stops at the first one that is missing."""
    store = open_store(BucketUrl.parse(f"file://{tmp_path}/store"), make=True)
    for name in ("a/1", "a/2"):
        store.put(name, b"")
    store.delete(["a/0", "a/1", "a/missing", "a/2"])
    assert not [one for page in store.listing("a/") for one in page]

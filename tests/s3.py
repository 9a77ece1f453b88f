"""A real server of S3 for tests, and a proxy before it that fails on purpose.

SeaweedFS from ``requirements/storage.txt``, in a directory of its own, on loopback; it is ended by
its process id.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hmac
import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.ports import free_port, free_ports

START_SECONDS = 60.0
KEY, SECRET = "tested", "tested-secret"
BUCKET = "tests"


class Server:
    """A running server with one bucket."""

    def __init__(self, root: Path, program: Path) -> None:
        self.ports = free_ports(4, beside=10_000)  # SeaweedFS takes those, too
        self.log = root / "weed.log"
        config = root / "s3.json"
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        keys = [{"accessKey": KEY, "secretKey": SECRET}]
        config.write_text(
            json.dumps({"identities": [{"name": "t", "credentials": keys, "actions": actions}]})
        )
        (root / "data").mkdir()
        master, volume, filer, self.port = self.ports
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    str(program), "server", f"-dir={root / 'data'}", "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1", f"-master.port={master}", f"-volume.port={volume}",
                    "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={self.port}",
                    f"-s3.config={config}", "-volume.max=50", "-master.volumeSizeLimitMB=256",
                    "-s3.port.iceberg=0", "-s3.port.lance=0",  # else fixed ones
                ],
                cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def until_ready(self) -> None:
        """Wait, bounded, until it takes an object, for which it makes the bucket."""
        store = S3Store(
            BUCKET, endpoint=self.endpoint, access_key_id=KEY, secret_access_key=SECRET,
            region="us-east-1", client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )  # fmt: skip
        limit = time.monotonic() + START_SECONDS
        while True:
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            try:
                obstore.put(store, "ready", b"")
                return
            except BaseError:
                assert time.monotonic() < limit, self.log.read_text()[-2000:]
                time.sleep(0.5)

    def shell(self, *commands: str) -> str:
        """Give commands to the server's own shell; return what it printed."""
        master, _, filer, _ = self.ports
        place = [f"-master=127.0.0.1:{master}", f"-filer=127.0.0.1:{filer}"]
        found = subprocess.run(
            [self.process.args[0], "shell", *place], text=True, timeout=60, check=False,
            input="\n".join(("lock", *commands, "unlock", "exit", "")), stderr=subprocess.STDOUT,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        return found.stdout

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)


class Azurite:
    """Microsoft's own simulation of Azure Blob Storage, with one container, in memory."""

    ACCOUNT = "devstoreaccount1"
    ACCOUNT_KEY = (  # documented: it is the same everywhere
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    )

    def __init__(self, root: Path, program: Path) -> None:
        self.port = free_port()
        self.log = root / "azurite.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [str(program), "--blobPort", str(self.port), "--inMemoryPersistence", "--silent",
                 "--disableTelemetry", "--skipApiVersionCheck"],
                cwd=root, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AZURE_STORAGE_USE_EMULATOR": "true",
            "AZURITE_BLOB_STORAGE_URL": f"http://127.0.0.1:{self.port}",
        }

    def make_container(self) -> None:
        """Wait, bounded, until it has made the container."""
        limit = time.monotonic() + START_SECONDS
        while True:
            date = email.utils.formatdate(usegmt=True)
            version = "2021-08-06"
            signed = (
                f"PUT{12 * chr(10)}x-ms-date:{date}\nx-ms-version:{version}\n"
                f"/{self.ACCOUNT}/{self.ACCOUNT}/{BUCKET}\nrestype:container"
            )
            key = base64.b64decode(self.ACCOUNT_KEY)
            mac = base64.b64encode(hmac.new(key, signed.encode(), "sha256").digest()).decode()
            link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
            try:
                link.request(
                    "PUT", f"/{self.ACCOUNT}/{BUCKET}?restype=container",
                    headers={"x-ms-date": date, "x-ms-version": version, "Content-Length": "0",
                             "Authorization": f"SharedKey {self.ACCOUNT}:{mac}"},
                )  # fmt: skip
                found = link.getresponse()
                assert found.status == 201, found.read()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-2000:]
                assert time.monotonic() < limit, self.log.read_text()[-2000:]
                time.sleep(0.5)
            finally:
                link.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(30)


def environment_of(endpoint: str) -> dict[str, str]:
    """Return the variables by which a job finds the server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }  # fmt: skip


def program(name: str) -> Path | None:
    """Return a program of this environment or of the host; None if there is none."""
    here = Path(sys.executable).parent / name
    found = str(here) if here.exists() else shutil.which(name)
    return Path(found) if found else None


@contextlib.contextmanager
def server(root: Path, path: Path) -> Iterator[Server]:
    """Run a server."""
    made = Server(root, path)
    try:
        made.until_ready()
        yield made
    finally:
        made.stop()


class Proxy:
    """Passes requests on, and fails some: refused with 503, done but the answer lost, or slow.

    Attributes:
        share: of the requests that fail in one of these ways.
        forbids_deletion: answer what deletes as a policy does that denies it.
        asked, failed: how many there were.
    """

    def __init__(self, target: Server, seed: int) -> None:
        self.share = 0.0
        self.forbids_deletion = False
        self.asked = self.failed = 0
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            port: ClassVar[int] = target.port

            def do_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                deletes = self.command == "DELETE" or self.path.partition("?")[2] == "delete"
                if proxy.forbids_deletion and deletes:
                    proxy.failed += 1
                    self.answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")
                    return
                way = proxy.draw()
                if way == "refused":
                    self.answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
                    return
                link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                link.request(self.command, self.path, body, dict(self.headers))
                found = link.getresponse()
                data = found.read()
                if way == "lost":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if way == "slow":
                    time.sleep(0.3)
                self.answer(found.status, found.getheaders(), data)
                link.close()

            def answer(self, status: int, headers: list[Any], data: bytes) -> None:
                self.send_response_only(status)
                lengths = [value for key, value in headers if key.lower() == "content-length"]
                for key, value in headers:
                    if key.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(key, value)
                length = lengths[0] if self.command == "HEAD" and lengths else str(len(data))
                self.send_header("Content-Length", length)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_any

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def draw(self) -> str:
        with self._lock:
            self.asked += 1
            if self._rng.random() >= self.share:
                return ""
            self.failed += 1
            return self._rng.choice(("refused", "lost", "slow"))

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(30)

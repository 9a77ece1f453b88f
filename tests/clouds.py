"""Metadata services on loopback that behave as the clouds' do, and misbehave as a test wants."""

import contextlib
import json
import threading
import time
from abc import ABC, abstractmethod
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

NOT_FOUND = 404, "not found"


class Cloud(ABC):
    """A server; a test changes its attributes while it runs.

    Attributes:
        fault: "" or one of "500", "hang", "garbage", "drip", "reset".
        requests: (method, path, headers, body) of each request.
        skew: seconds that this service's clock is ahead of the host's.
    """

    def __init__(self):
        self.fault = ""
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.skew = 0.0
        self.over = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def url(self) -> str:
        return f"http://{self.host}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self._server.shutdown()
        self._thread.join(5)
        self._server.server_close()

    def now(self) -> datetime:
        return datetime.now(timezone.utc) + timedelta(seconds=self.skew)

    def in_seconds(self, seconds: float) -> datetime:
        return self.now() + timedelta(seconds=seconds)

    @abstractmethod
    def answer(self, method: str, path: str, query: dict, headers, body: bytes):
        """Return (status, text) or (status, text, headers)."""


class Aws(Cloud):
    """IMDSv2: no answer without a token that is not too old."""

    def __init__(self):
        super().__init__()
        self.token = "one"
        self.documents: dict[str, str] = {}

    def interrupt(self, action: str, seconds: float) -> None:
        at = self.in_seconds(seconds).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.documents["spot/instance-action"] = json.dumps({"action": action, "time": at})

    def recommend(self) -> None:
        at = self.now().strftime("%Y-%m-%dT%H:%M:%SZ")
        self.documents["events/recommendations/rebalance"] = json.dumps({"noticeTime": at})

    def answer(self, method, path, query, headers, body):
        if method == "PUT" and path == "/latest/api/token":
            seconds = headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            return (200, self.token) if seconds.isdecimal() else (400, "")
        if headers.get("X-aws-ec2-metadata-token") != self.token:
            return 401, "unauthorized"
        found = self.documents.get(path.removeprefix("/latest/meta-data/"))
        return NOT_FOUND if found is None else (200, found)


class Gcp(Cloud):
    """Values with etags; an answer is held back until the value is another one."""

    def __init__(self):
        super().__init__()
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}

    def answer(self, method, path, query, headers, body):
        if headers.get("Metadata-Flavor") != "Google":
            return 403, "forbidden"
        name = path.removeprefix("/computeMetadata/v1/instance/")
        if name not in self.values:
            return NOT_FOUND
        limit = time.monotonic() + float(query.get("timeout_sec", ["60"])[0])
        if "wait_for_change" in query:
            known = query.get("last_etag", [""])[0]
            while self.etag(name) == known and time.monotonic() < limit:
                if self.over.wait(0.02):
                    break
        return 200, self.values[name], {"ETag": self.etag(name)}

    def etag(self, name: str) -> str:
        return f"e{self.values[name].lower().replace('_', '')}"


class Azure(Cloud):
    """Scheduled Events; an event that was acknowledged begins."""

    def __init__(self):
        super().__init__()
        self.events: list[dict] = []
        self.machine = "vm_0"

    def schedule(self, kind: str, seconds: float, *machines: str) -> None:
        self.events.append(
            {
                "EventId": f"event-{len(self.events)}",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": list(machines or [self.machine]),
                "EventStatus": "Scheduled",
                "NotBefore": format_datetime(self.in_seconds(seconds), usegmt=True),
                "Description": "",
                "EventSource": "Platform",
                "DurationInSeconds": -1,
            }
        )

    def answer(self, method, path, query, headers, body):
        if headers.get("Metadata") != "true" or "api-version" not in query:
            return 400, "bad request"
        if path == "/metadata/instance/compute/name":
            return 200, self.machine
        if path != "/metadata/scheduledevents":
            return NOT_FOUND
        if method == "POST":
            started = {one["EventId"] for one in json.loads(body)["StartRequests"]}
            for event in self.events:
                if event["EventId"] in started:
                    event |= {"EventStatus": "Started", "NotBefore": ""}
            return 200, ""
        return 200, json.dumps({"DocumentIncarnation": len(self.events), "Events": self.events})


def _handler(cloud: Cloud):
    class Handler(BaseHTTPRequestHandler):
        def date_time_string(self, timestamp=None) -> str:
            return format_datetime(cloud.now(), usegmt=True)

        def log_message(self, *_) -> None:
            pass

        def serve(self) -> None:
            address = urlparse(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            cloud.requests.append((self.command, self.path, dict(self.headers), body))
            if cloud.fault and self.misbehave():
                return
            query = parse_qs(address.query)
            found = cloud.answer(self.command, address.path, query, self.headers, body)
            status, text, headers = (*found, {})[:3]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def misbehave(self) -> bool:
            if cloud.fault == "hang":
                cloud.over.wait(30)
            elif cloud.fault == "drip":
                self.send_response(200)
                self.end_headers()
                while not cloud.over.wait(0.2):
                    self.wfile.write(b"x")
            elif cloud.fault == "reset":
                self.connection.close()
            elif cloud.fault == "500":
                self.send_error(500)
            else:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'\x1b[31m{"action": ["\xff')
            return True

        do_GET = do_PUT = do_POST = serve

        def handle(self) -> None:
            with contextlib.suppress(OSError):  # the client has gone
                super().handle()

    return Handler

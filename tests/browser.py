"""A real Chromium without a window, driven over the two pipes of its DevTools protocol."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE_SECONDS = 60.0


def why_not() -> str:
    """Return why a browser is missing; empty if one is installed."""
    return "" if program() else f"no browser: install one of {', '.join(NAMES)}"


def program() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of one browser, which ends with the block, and its profile with it.

    Attributes:
        console: what the page printed, with errors of the engine.
        requests: the URLs that it requested.
    """

    def __init__(self) -> None:
        self.console: list[str] = []
        self.requests: list[str] = []
        self._profile = tempfile.mkdtemp(prefix="elastic-ckpt-browser-")
        self._numbers = itertools.count(1)
        self._rest = b""
        self._session = ""
        self._loaded = False

    def __enter__(self) -> Browser:
        path = program()
        assert path, why_not()
        self._reading, answers = os.pipe()
        commands, self._writing = os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (commands, answers)]
        os.close(commands)
        os.close(answers)
        command = [
            path, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-pipe", f"--user-data-dir={self._profile}", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--hide-scrollbars",
            "about:blank",
        ]  # fmt: skip
        # The protocol has fixed numbers: 3 to read commands from, 4 to answer on.
        shell = 'exec "$@" 3<&{0} 4>&{1} {0}<&- {1}>&-'.format(*theirs)
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=theirs,
            start_new_session=True,
        )
        for fd in theirs:
            os.close(fd)
        try:
            self._attach()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the browser and its children; remove its profile."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._session = ""
            self._send("Browser.close")
            self._process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
        os.close(self._reading)
        os.close(self._writing)
        limit = time.monotonic() + 10
        while os.path.exists(self._profile) and time.monotonic() < limit:
            shutil.rmtree(self._profile, ignore_errors=True)  # its children may still write

    def open(self, path: Path) -> None:
        """Load a file, and wait until it has loaded."""
        self.visit(path.resolve().as_uri())

    def visit(self, url: str) -> None:
        """Load an address, and wait until it has loaded."""
        self._loaded = False
        self.call("Page.navigate", url=url)
        limit = time.monotonic() + PATIENCE_SECONDS
        while not self._loaded:
            self._take(limit)

    def look_like(
        self, width: int, height: int, *, dark: bool = False, phone: bool = False
    ) -> None:
        """Set the window's size in CSS pixels and the preferred colour scheme."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        scheme = "dark" if dark else "light"
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def value(self, expression: str) -> Any:
        """Evaluate an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def picture(self, path: Path, top: int = 0, height: int = 0) -> None:
        """Return a PNG of the window, or of a part of the page in CSS pixels."""
        clip = {"x": 0, "y": top, "width": self.value("innerWidth"), "height": height, "scale": 1}
        more = {"clip": clip, "captureBeyondViewport": True} if height else {}
        found = self.call("Page.captureScreenshot", **more)
        path.write_bytes(base64.b64decode(found["data"]))

    def print(self) -> bytes:
        """Return the page as PDF, A4."""
        found = self.call(
            "Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True,
            printBackground=False,
        )  # fmt: skip
        return base64.b64decode(found["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the protocol and return its result."""
        number = self._send(method, **parameters)
        limit = time.monotonic() + PATIENCE_SECONDS
        while True:
            answer = self._take(limit)
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    # -- inside -------------------------------------------------------------------------------

    def _send(self, method: str, **parameters: Any) -> int:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writing, data) :]
        return number

    def _attach(self) -> None:
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        found = self.call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _take(self, limit: float) -> dict[str, Any]:
        """Return the next message; record events."""
        while b"\0" not in self._rest:
            left = limit - time.monotonic()
            assert left > 0, "the browser does not answer"
            if select.select([self._reading], [], [], left)[0]:
                data = os.read(self._reading, 1 << 20)
                assert data, "the browser is gone"
                self._rest += data
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, event: str, found: dict[str, Any]) -> None:
        match event:
            case "Page.loadEventFired":
                self._loaded = True
            case "Runtime.consoleAPICalled":
                self.console.append(json.dumps(found["args"]))
            case "Runtime.exceptionThrown":
                self.console.append(json.dumps(found["exceptionDetails"]))
            case "Log.entryAdded":
                self.console.append(found["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(found["request"]["url"])

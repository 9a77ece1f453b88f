"""The live page: who may read it, what it answers, and a page that is slow or cannot be made."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_ckpt.cli.report.material import collect
from elastic_ckpt.cli.report.page import render
from elastic_ckpt.cli.run.command import settings_of
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.supervisor.settings import RunSettings
from elastic_ckpt.supervisor.web import guard, live_page, renderer
from elastic_ckpt.supervisor.web.guard import Guard
from elastic_ckpt.supervisor.web.live_page import LivePage
from elastic_ckpt.supervisor.web.renderer import CACHE_SECONDS, PageRenderer, command_for
from elastic_ckpt.supervisor.web.script import POLICY, SCRIPT

pytestmark = pytest.mark.one_torch

PAGE = b"<p>the job</p></html>\n"
SECRET = "s3cret-token"


def prints(page: bytes, after: str = "") -> tuple[str, ...]:
    """Return a command that prints a page."""
    return sys.executable, "-c", f"import sys, time\n{after}\nsys.stdout.buffer.write({page!r})"


def settings_for(tmp_path: Path, address: tuple[str, int] | None) -> RunSettings:
    return RunSettings(
        directory=tmp_path, script=tmp_path / "t.py", args=(), name="j", node="n", web=address
    )


Start = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Start a page on an address; returns its port and what it showed."""
    monkeypatch.setattr(live_page, "command_for", lambda _: prints(PAGE))
    monkeypatch.setattr(guard, "token", lambda: SECRET)
    with contextlib.ExitStack() as stack:

        def begin(host: str = "127.0.0.1") -> tuple[int, list[str]]:
            shown: list[str] = []
            page = LivePage(settings_for(tmp_path, (host, 0)), True, True, shown.append)
            page.start()
            stack.callback(page.stop)
            [line] = shown
            return int(re.search(r":(\d+)/", line)[1]), shown  # type: ignore[index]

        yield begin
    assert not [one for one in threading.enumerate() if one.name == "live-page"]


def ask(
    port: int, path: str = "/", method: str = "GET", host: str = "localhost", **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in ({"Host": host} if host else {}).items() | headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def test_loopback_needs_no_token(start: Start) -> None:
    port, shown = start()
    assert shown == [f"live page: http://127.0.0.1:{port}/"]
    status, body, headers = ask(port)
    assert (status, body) == (200, PAGE)
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["Cache-Control"] == "no-store" and headers["X-Frame-Options"] == "DENY"
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_head_has_no_body(start: Start) -> None:
    status, body, headers = ask(start()[0], method="HEAD")
    assert (status, body, headers["Content-Length"]) == (200, b"", str(len(PAGE)))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "get"])
def test_the_page_is_read_only(start: Start, method: str) -> None:
    status, body, headers = ask(start()[0], method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD") and PAGE not in body


@pytest.mark.parametrize(
    "path", ["/x", "/../etc/passwd", "//etc/passwd", "/%2e%2e/x", "/journal", "/favicon.ico",
             "http://evil.example/"],
)  # fmt: skip
def test_no_files_are_served(start: Start, path: str) -> None:
    assert ask(start()[0], path)[0] == 404


@pytest.mark.parametrize(
    "host",
    ["evil.example", "", "localhost.evil.example", "127.0.0.1.evil.example", "a b", "[::1",
     "localhost:1:2", "@localhost"],
)  # fmt: skip
def test_a_rebound_name_is_refused(start: Start, host: str) -> None:
    status, body, _ = ask(start()[0], host=host)
    assert status == 421 and PAGE not in body


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:9", "10.0.0.7", "localhost.:80"]
)
def test_names_of_this_host_are_taken(start: Start, host: str) -> None:
    """At any port: a tunnel has another one."""
    assert ask(start()[0], host=host)[0] == 200


def test_other_addresses_need_the_token(start: Start) -> None:
    port, shown = start("0.0.0.0")
    assert shown[0].endswith(f":{port}/?token={SECRET}")
    assert ask(port)[0] == 403
    for bad in ("", SECRET[:-1], f"{SECRET}x", "é" * 10, "x" * 10_000):
        wrong = {"Authorization": f"Bearer {bad}"} if bad.isascii() else {}
        assert ask(port, f"/?token={'%C3%A9' if wrong == {} else bad}", **wrong)[0] == 403
    assert ask(port, Authorization=f"Bearer {SECRET}")[:2] == (200, PAGE)
    assert ask(port, Cookie=f"elastic-ckpt-{port}=nonsense")[0] == 403
    assert ask(port, host="evil.example", Authorization=f"Bearer {SECRET}")[0] == 421


def test_the_token_leaves_the_address_bar(start: Start) -> None:
    """It becomes a cookie that no script and no other site gets."""
    port, _ = start("0.0.0.0")
    status, body, headers = ask(port, f"/?token={SECRET}")
    assert (status, body, headers["Location"]) == (303, b"", "/")
    cookie, _, attributes = headers["Set-Cookie"].partition("; ")
    assert attributes == "Path=/; HttpOnly; SameSite=Strict"
    assert ask(port, Cookie=f"a=b; {cookie}")[:2] == (200, PAGE)


def test_a_name_of_this_host_in_any_domain_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a token only: on loopback the short name is nobody's."""
    monkeypatch.setattr(guard.socket, "gethostname", lambda: "node7.cluster")
    anywhere = Guard("0.0.0.0", "0.0.0.0", 1)
    assert anywhere.knows("node7:80") and anywhere.knows("NODE7.example.org")
    assert not anywhere.knows("node8")
    assert not Guard("127.0.0.1", "127.0.0.1", 1).knows("node7")
    assert Guard("gpu.example", "127.0.0.1", 1).knows("gpu.example:80")


def test_tokens_are_long_and_one_per_process() -> None:
    assert len(guard.token()) >= 32 and guard.token() == guard.token()


def test_a_taken_address_is_an_error_at_first(start: Start, tmp_path: Path) -> None:
    """Later, in another role of the same process, the job matters more."""
    port, _ = start()
    settings, shown = settings_for(tmp_path, ("127.0.0.1", port)), list[str]()
    with pytest.raises(UsageError, match=r"--web 127.0.0.1:\d+: .*in use"):
        LivePage(settings, True, True, shown.append)
    later = LivePage(settings, True, False, shown.append)
    later.start()
    later.stop()
    assert shown == []


@pytest.mark.parametrize(("address", "leads"), [(None, True), (("127.0.0.1", 0), False)])
def test_without_the_option_or_the_lead_nothing_is_served(
    tmp_path: Path, address: tuple[str, int] | None, leads: bool
) -> None:
    shown: list[str] = []
    page = LivePage(settings_for(tmp_path, address), leads, True, shown.append)
    page.start()
    page.stop()
    assert shown == []


def test_the_option(tmp_path: Path) -> None:
    script = tmp_path / "t.py"
    script.write_text("")
    given = ["--dir", str(tmp_path / "job"), "--nproc", "1", "--web", "[::1]:8080", str(script)]
    assert settings_of(given).web == ("::1", 8080)
    with pytest.raises(UsageError, match="--web 'x' is not PORT"):
        settings_of([*given[:5], "x", str(script)])


# -- rendering --------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_page_is_kept_for_a_moment(tmp_path: Path) -> None:
    count, clock = tmp_path / "count", Clock()
    found = PageRenderer(prints(PAGE, f"open({str(count)!r}, 'a').write('x')"), clock)
    for _ in range(3):
        assert found.page() == PAGE
    assert count.read_text() == "x"
    clock.now += CACHE_SECONDS
    assert found.page() == PAGE and count.read_text() == "xx"


def test_many_readers_wait_for_one_rendering(tmp_path: Path) -> None:
    count = tmp_path / "count"
    found = PageRenderer(prints(PAGE, f"open({str(count)!r}, 'a').write('x'); time.sleep(0.3)"))
    pages: list[bytes | None] = []
    readers = [threading.Thread(target=lambda: pages.append(found.page())) for _ in range(6)]
    for one in readers:
        one.start()
    for one in readers:
        one.join(30)
    assert pages == [PAGE] * 6 and count.read_text() == "x"


def test_a_directory_that_hangs_is_given_up(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer, "RENDER_SECONDS", 0.2)
    monkeypatch.setattr(live_page, "command_for", lambda _: prints(PAGE, "time.sleep(60)"))
    began = time.monotonic()
    status, body, headers = ask(start()[0])
    assert (status, headers["Retry-After"]) == (503, "5") and b"may not answer" in body
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("after", ["sys.exit(3)", "raise OSError", "sys.stdout.write('<p>')"])
def test_what_is_cut_or_fails_is_not_served(after: str) -> None:
    page = PAGE if after != "sys.stdout.write('<p>')" else b"half"
    assert PageRenderer(prints(page, after)).page() is None
    assert PageRenderer(("/nonexistent",)).page() is None


def test_stop_ends_what_is_rendered(tmp_path: Path) -> None:
    started = tmp_path / "started"
    found = PageRenderer(prints(PAGE, f"open({str(started)!r}, 'w'); time.sleep(60)"))
    pages: list[bytes | None] = []
    reader = threading.Thread(target=lambda: pages.append(found.page()))
    reader.start()
    while not started.exists():
        time.sleep(0.01)
    found.stop()
    reader.join(20)
    assert not reader.is_alive() and pages == [None] and found.page() is None


def test_the_real_command_prints_the_page(job: JobDirectory) -> None:
    done = subprocess.run(
        command_for(job.root), capture_output=True, timeout=60, check=True, cwd=job.root
    )
    assert done.stdout.startswith(b"<!DOCTYPE html>") and b'id="live"' in done.stdout
    assert done.stdout.rstrip().endswith(b"</html>")


def test_only_the_live_page_has_a_script(job: JobDirectory) -> None:
    """The one whose hash the policy names."""
    html = render(collect(job), is_live=True)
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script == SCRIPT
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in POLICY and POLICY in html
    assert "<script" not in render(collect(job)) and 'id="live"' not in render(collect(job))

"""The live page of a real job in a real browser: it follows, stays readable, and says the end."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.browser import Browser, why_not
from tests.job import SCRIPTS, Job, survivors

SECONDS = 240.0

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")


def until(browser: Browser, expression: str) -> None:
    """Wait, bounded, until an expression is true in the page."""
    limit = time.monotonic() + SECONDS
    while not browser.value(expression):
        assert time.monotonic() < limit, f"{expression}: {browser.value('document.body.innerText')}"
        time.sleep(0.2)


def address(job: Job) -> str:
    """Return where the newest run says that its page is."""
    return re.findall(r"live page: (\S+)", job.log.read_text())[-1]


def test_the_page_follows_the_job_and_says_when_it_ends(tmp_path: Path) -> None:
    enough = tmp_path / "enough"
    with Job(tmp_path, "--enough", str(enough), script=SCRIPTS / "reporting.py") as job:
        job.start("--web", "0").until_step(30)
        url = address(job)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
        with Browser() as browser:
            browser.look_like(1280, 900)
            browser.visit(url)
            assert browser.value("document.querySelector('.pill').innerText") == "training"
            assert browser.value("document.querySelectorAll('.pill.amber, .pill.red').length") == 0
            browser.value("window.mine = 'here'; scrollTo(0, 500)")

            psutil.Process(job.view().workers[1].pid).send_signal(signal.SIGKILL)
            until(browser, "document.querySelector('#f1 summary') !== null")
            browser.value("document.querySelector('#f1 details').open = true")
            written = browser.value("document.querySelector('.facts').innerText")
            until(browser, f"document.querySelector('.facts').innerText !== {written!r}")
            assert browser.value("window.mine") == "here"  # it was never loaded again
            assert browser.value("document.querySelector('#f1 details').open") is True
            assert browser.value("scrollY") == 500
            assert browser.console == []
            assert set(browser.requests) == {url}

            inline = "const s = document.createElement('script'); s.textContent = 'window.bad = 1';"
            browser.value(f"{inline} document.body.append(s)")
            assert browser.value("window.bad") is None  # one script, and no other

            enough.touch()
            tree = job.tree()
            assert job.wait() == 0, job.output()
            until(browser, "document.querySelector('#live').classList.contains('amber')")
            assert "The run has ended" in browser.value("document.querySelector('#live').innerText")
            assert browser.value("document.querySelector('#f1') !== null")
        assert survivors(tree) == []


def test_elsewhere_the_page_needs_the_token(tmp_path: Path) -> None:
    """The browser keeps it in a cookie, out of the address bar and out of scripts' reach."""
    endless = ("--enough", str(tmp_path / "never"))
    with Job(tmp_path, *endless, script=SCRIPTS / "reporting.py") as job:
        job.start("--web", "0.0.0.0:0").until_training()
        found = re.fullmatch(r"http://[^/]+:(\d+)/\?token=([\w-]{32})", address(job))
        assert found, job.output()
        bare = f"http://127.0.0.1:{found[1]}/"
        with Browser() as browser:
            browser.visit(bare)
            text = browser.value("document.body.innerText")
            assert "with its token" in text and "goodput" not in text
            browser.visit(f"{bare}?token={found[2]}")
            until(browser, "document.querySelector('.pill') !== null")
            assert browser.value("location.href") == bare
            assert browser.value("document.cookie") == ""
        logs = job.directory / ".elastic-ckpt"
        written = [path for path in logs.rglob("*") if path.is_file()]
        assert not any(found[2].encode() in path.read_bytes() for path in written)

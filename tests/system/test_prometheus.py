"""A real Prometheus looks at a real job: through a crash, a preemption and another run."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elastic_ckpt.supervisor.metrics.table import METRICS, Kind
from tests.job import Job, environment, survivors

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "torch_ddp.py"
ALERTS = REPOSITORY / "scripts" / "prometheus" / "alerts.yml"
NEVER = "100000000"

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")), reason="needs prometheus"
)

Series = dict[tuple[str, ...], float]
"""By name, then values of labels in the order of the labels' names."""


class Prometheus:
    """One of this test's own: its configuration, its data, a port of loopback."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.config = directory / "prometheus.yml"
        self.targets = directory / "targets.json"
        self.log = directory / "log"
        self.config.write_text(f"""
global: {{scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}}
rule_files: ["{ALERTS}"]
scrape_configs:
  - job_name: elastic-ckpt
    file_sd_configs: [{{files: ["{self.targets}"], refresh_interval: 1s}}]
""")
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus", f"--config.file={self.config}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    "--web.listen-address=127.0.0.1:0", "--log.level=warn",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        self.port = 0

    def find(self, address: str) -> None:
        """Look there from now on."""
        made = self.targets.with_suffix(".new")
        made.write_text(json.dumps([{"targets": [address]}]))
        made.replace(self.targets)

    def api(self, path: str, **query: str) -> Any:
        """What its HTTP API answers."""
        if not self.port:
            self.port = until(self._listens_at, "that it listens")
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            found = json.load(answer)
        assert found["status"] == "success", found
        return found["data"]

    def ask(self, query: str) -> Series:
        """An instant query."""
        found: Series = {}
        for one in self.api("query", query=query)["result"]:
            labels = one["metric"]
            name = labels.pop("__name__", "").removeprefix("elastic_ckpt_")
            for known in ("job", "instance", "job_name"):
                labels.pop(known, None)
            values = [value for _, value in sorted(labels.items())]
            found[(name, *values)] = float(one["value"][1])
        return found

    def look(self) -> Series:
        """All of the job's metrics as they were at one moment from now on."""
        began = time.time()

        def newer() -> Series | None:
            found = self.ask('{__name__=~"elastic_ckpt_.*"}')
            return found if found.get(("written_timestamp_seconds",), 0.0) > began else None

        return until(newer, "a scrape")

    def _listens_at(self) -> int:
        assert self.process.poll() is None, self.log.read_text()
        listening = [
            one.laddr.port
            for one in psutil.Process(self.process.pid).net_connections()
            if one.status == psutil.CONN_LISTEN
        ]
        return next(iter(listening), 0)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)


def until(condition: Callable[[], Any], what: str, seconds: float = 180.0) -> Any:
    limit = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):  # it is not there yet
            found = condition()
            if found:
                return found
        assert time.monotonic() < limit, f"not within {seconds} s: {what}"
        time.sleep(0.05)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    found = Prometheus(tmp_path / "prometheus")
    yield found
    found.close()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with Job(tmp_path / "run", "--epochs", NEVER, script=SCRIPT) as found:
        found.options = ["--name", "gpt", "--save-interval", NEVER, "--max-failures", "4"]
        yield found


def address(job: Job) -> str:
    """Return the address that ``run`` has printed."""
    found = re.findall(r"metrics: http://(\S+)/metrics", job.log.read_text())
    assert found, job.output()
    return str(found[-1])


def status(job: Job) -> Any:
    shown = subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "status", "--json", str(job.directory)],
        capture_output=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    return json.loads(shown.stdout)


def save(job: Job) -> None:
    subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "save", str(job.directory)],
        capture_output=True, env=environment(), timeout=60, check=True,
    )  # fmt: skip


def compare(job: Job, prometheus: Prometheus) -> Series:
    """Everything that both show must be the same, or lie between two looks at what moves."""
    before = status(job)
    found = prometheus.look()
    after = status(job)
    assert before["position"]["step"] <= found["step",] <= after["position"]["step"]
    assert found["state", "running"] == 1 and before["state"] == "running"
    assert found["incarnation",] == after["incarnation"]
    left = [one["restarts"]["failures_left"] for one in (before, after)]
    assert left[0] <= found["failures_left",] <= left[1]  # a checkpoint refills it
    assert found["restarts_total", "preemption"] == after["restarts"]["preemptions"]
    assert set(after["reported"]) == {name[1] for name in found if name[0] == "reported"}
    newest = after["newest_intact"]
    assert found["checkpoint_step", newest["tier"]] == newest["step"]
    assert found["checkpoint_bytes", newest["tier"]] == newest["bytes"]
    sealed = time.time() - newest["age_seconds"]
    assert found["checkpoint_timestamp_seconds", newest["tier"]] == pytest.approx(sealed, abs=5)
    for worker in after["workers"]:
        rank = str(worker["rank"])
        size = found["worker_resident_memory_bytes", rank]
        assert size == pytest.approx(worker["rss_bytes"], rel=0.2)
    spent = {name[1]: value for name, value in found.items() if name[0] == "time_seconds"}
    for category, seconds in spent.items():
        low, high = sorted(one["time"][category] for one in (before, after))
        assert low - 0.1 <= seconds <= high + 0.1, category
    assert found["goodput_ratio",] == pytest.approx(spent["training"] / sum(spent.values()))
    events = [one for one in job.events() if not one["data"].get("follows")]
    counts = {name: sum(one["event"] == name for one in events) for name in ("saved", "crash")}
    for metric, name in (("saves_total", "saved"), ("crashes_total", "crash")):
        assert sum(v for key, v in found.items() if key[0] == metric) == counts[name], metric
    stalls = sum(one["data"]["stall_seconds"] for one in events if one["event"] == "saved")
    assert found["save_stall_seconds_total",] == pytest.approx(stalls)
    return found


def test_prometheus_matches_status_and_the_journal(
    job: Job, prometheus: Prometheus, tmp_path: Path
) -> None:
    file = tmp_path / "gpt.prom"
    job.start("--metrics", "0", "--metrics-file", str(file))
    job.until_training()
    prometheus.find(address(job))
    save(job)
    found = compare(job, prometheus)
    assert found["saves_total", "manual", "disk"] == 1
    assert 0 < found["reported", "loss"] < 100

    job.workers()[1].kill()
    job.until(lambda view: view.last_recovery and view.state == "running", "a recovery")
    job.until_step(int(found["checkpoint_step", "disk"]) + 1)
    found = compare(job, prometheus)
    assert found["crashes_total", "signal"] == 1
    assert found["restarts_total", "failure"] == 1 == status(job)["restarts"]["failures"]
    assert found["time_seconds", "lost_work"] > 0 and found["time_seconds", "recovery"] > 0
    stages = status(job)["last_recovery"]["stages"]
    assert stages == {n[1]: v for n, v in found.items() if n[0] == "last_recovery_duration_seconds"}

    check_everything_asked_for_in_the_page(prometheus)
    end(job)
    until(lambda: prometheus.ask('up{job="elastic-ckpt"}') == {("up",): 0.0}, "that it is gone")
    check_file(file)

    port = address(job)  # which the next run gets at once
    job.start("--metrics", port)
    job.until_training()
    found = compare(job, prometheus)
    assert found["crashes_total", "signal"] == 1
    assert found["restarts_total", "preemption"] == 1
    assert found["saves_total", "emergency", "disk"] == 1
    for metric in METRICS:
        if metric.kind is Kind.COUNTER:
            assert prometheus.ask(f"sum(resets({metric.name}[5m]))") == {("",): 0.0}
    rose = prometheus.ask("increase(elastic_ckpt_crashes_total[5m]) > 0")
    assert list(rose) == [("", "signal")]
    end(job)


def test_finished_job_is_seen_as_finished_and_is_not_down(
    prometheus: Prometheus, tmp_path: Path
) -> None:
    """Its supervisor ends after the look that shows it; a killed one pages."""
    down = expression_of_down()
    with Job(tmp_path / "run", "--epochs", "1", script=SCRIPT) as job:
        job.options = ["--name", "gpt", "--max-failures", "4"]
        job.start("--metrics", "0")
        until(lambda: "metrics: http" in job.log.read_text(), "the address")
        prometheus.find(address(job))
        assert job.wait() == 0, job.output()
        until(lambda: prometheus.ask('up{job="elastic-ckpt"}') == {("up",): 0.0}, "it is gone")
        last = prometheus.ask('last_over_time(elastic_ckpt_state{state="finished"}[5m])')
        assert list(last.values()) == [1.0]
        assert prometheus.ask(down) == {}

        port = address(job)
        job.arguments = ["--epochs", NEVER]
        job.directory = tmp_path / "run" / "other"
        job.start("--metrics", port)
        query = 'elastic_ckpt_state{state="running"} == 1'
        until(lambda: prometheus.ask(query), "that the next job trains")
        job.supervisor().kill()
        until(lambda: list(prometheus.ask(down).values()) == [0.0], "that it is down")


def expression_of_down() -> str:
    """The expression of ElasticCkptDown, as the rules have it."""
    pattern = r"alert: ElasticCkptDown\n\s+expr: >-\n(.*?)\n\s+for:"
    found = re.search(pattern, ALERTS.read_text(), re.DOTALL)
    assert found is not None
    return " ".join(found[1].split())


def check_everything_asked_for_in_the_page(prometheus: Prometheus) -> None:
    """Each query has an answer, each alert is one that it can work out."""
    page = (REPOSITORY / "docs" / "metrics.md").read_text()
    [block] = re.findall(r"```promql\n(.*?)```", page, re.DOTALL)
    for query in [line for line in block.splitlines() if not line.startswith("#")]:
        short = re.sub(r"\[\w+\]", "[10s]", query)
        until(lambda short=short: prometheus.ask(short) or "rate(" in short, short)

    board = json.loads(ALERTS.with_name("dashboard.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            prometheus.ask(target["expr"].replace("$job", ".*"))  # valid, as the API says

    def evaluated() -> Any:
        [group] = prometheus.api("rules")["groups"]
        rules = group["rules"]
        return rules if all(rule["health"] != "unknown" for rule in rules) else None

    rules = until(evaluated, "the alerts")
    assert len(rules) == 7
    assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
    firing = [rule["name"] for rule in rules if rule["state"] == "firing"]
    assert "ElasticCkptSavesFail" not in firing and "ElasticCkptFailed" not in firing


def check_file(file: Path) -> None:
    """How it ended, as node_exporter reads it."""
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert list(file.parent.glob("*.tmp")) == list(file.parent.glob(".*.tmp")) == []
    families = list(text_string_to_metric_families(file.read_text()))
    states = next(one for one in families if one.name == "elastic_ckpt_state").samples
    assert [one.labels["state"] for one in states if one.value] == ["preempted"]
    saves = next(one for one in families if one.name == "elastic_ckpt_saves").samples
    assert [one.labels["reason"] for one in saves if one.value] == ["emergency", "manual"]
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=file.read_bytes(), capture_output=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def end(job: Job) -> None:
    """Preempt it; nothing is left of it."""
    tree = job.tree()
    job.supervisor().send_signal(signal.SIGTERM)
    assert job.wait() == 75, job.output()
    assert survivors(tree) == []

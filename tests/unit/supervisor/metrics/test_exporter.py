"""Metrics at an address and in a file: options, limits, and readers and disks that hang."""

from __future__ import annotations

import http.client
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.metrics_core import GaugeMetricFamily

from elastic_ckpt.cli.run.command import settings_of
from elastic_ckpt.errors import UsageError
from elastic_ckpt.supervisor.metrics import outputs
from elastic_ckpt.supervisor.metrics.exporter import check_file
from elastic_ckpt.supervisor.metrics.outputs import MetricsFile, MetricsServer
from elastic_ckpt.util import http_server
from elastic_ckpt.util.http_server import MAX_READERS, parse_address
from tests.waiting import until

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).parents[4]
ENDLESS = 60


class OneNumber:
    """A collector of one number, or of an error."""

    def __init__(self) -> None:
        self.value = 1.0
        self.error: Exception | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self.error is not None:
            raise self.error
        yield GaugeMetricFamily("number", "A number", self.value)


@pytest.fixture
def number() -> OneNumber:
    return OneNumber()


@pytest.fixture
def server(number: OneNumber) -> Iterator[MetricsServer]:
    found = MetricsServer("127.0.0.1", 0, number.registry)
    found.start()
    yield found
    found.stop()
    assert not threads("metrics-server")


def threads(name: str) -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name == name]


def address(server: MetricsServer) -> tuple[str, int]:
    host, port = server.url.removeprefix("http://").removesuffix("/metrics").rsplit(":", 1)
    return host.strip("[]"), int(port)


def fetch(server: MetricsServer, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(*address(server), timeout=20)
    connection.request(method, "/metrics")
    answer = connection.getresponse()
    found = answer.status, answer.read().decode()
    connection.close()
    return found


# -- an address -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("9400", ("127.0.0.1", 9400)),
        ("0", ("127.0.0.1", 0)),
        ("localhost:9400", ("localhost", 9400)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
        ("[::1]:9400", ("::1", 9400)),
    ],
)
def test_parse_address(text: str, found: tuple[str, int]) -> None:
    assert parse_address(text, "--metrics") == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":9400",
        "9400:",
        "::1:9400",
        "[::1]",
        "65536",
        "-1",
        "a b:1",
        "٩٤٠٠",
        "1" * 5000,
        "a:b:1",
    ],
)
def test_parse_address_rejects(text: str) -> None:
    with pytest.raises(UsageError, match="is not PORT, HOST:PORT or"):
        parse_address(text, "--metrics")


def test_the_server_answers_with_current_values(number: OneNumber, server: MetricsServer) -> None:
    assert fetch(server) == (200, "# HELP number A number\n# TYPE number gauge\nnumber 1.0\n")
    number.value = 2.0
    assert fetch(server)[1].endswith("number 2.0\n")


def test_an_address_in_use_is_an_error(server: MetricsServer) -> None:
    host, port = address(server)
    with pytest.raises(UsageError, match=rf"--metrics {host}:{port}: .*in use.*: give another"):
        MetricsServer(host, port, CollectorRegistry())


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_host_is_an_error(host: str) -> None:
    with pytest.raises(UsageError, match=f"--metrics {host}:9400: .*give another address"):
        MetricsServer(host, 9400, CollectorRegistry())


def test_an_address_can_be_reused_at_once(number: OneNumber) -> None:
    """Even with connections of the first server in TIME_WAIT."""
    first = MetricsServer("127.0.0.1", 0, number.registry)
    first.start()
    assert fetch(first)[0] == 200
    first.stop()
    second = MetricsServer(*address(first), number.registry)
    second.start()
    assert fetch(second)[0] == 200
    second.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6(number: OneNumber) -> None:
    try:
        server = MetricsServer("::1", 0, number.registry)
    except UsageError as error:
        pytest.skip(f"needs IPv6: {error}")
    assert server.url.startswith("http://[::1]:")
    server.start()
    assert fetch(server)[0] == 200
    server.stop()


def test_silent_readers_do_not_block_others(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "PATIENCE_SECONDS", ENDLESS)
    silent = [socket.create_connection(address(server)) for _ in range(MAX_READERS - 1)]
    assert fetch(server)[0] == 200
    for one in silent:
        one.close()


def test_readers_above_the_limit_are_refused(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until one of the others has gone."""
    monkeypatch.setattr(http_server, "PATIENCE_SECONDS", ENDLESS)
    silent = [socket.create_connection(address(server)) for _ in range(MAX_READERS)]
    with socket.create_connection(address(server), timeout=20) as one_too_many:
        assert one_too_many.recv(1) == b""
    silent.pop().close()

    def fits() -> bool:
        try:
            return fetch(server)[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    until(fits, "room for another one")
    for one in silent:
        one.close()


def test_a_silent_reader_is_disconnected(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(http_server, "PATIENCE_SECONDS", 0.05)
    with socket.create_connection(address(server), timeout=20) as silent:
        assert silent.recv(1) == b""
    with socket.create_connection(address(server), timeout=20) as halfway:
        halfway.sendall(b"GET /metr")
        assert halfway.recv(1) == b""
    assert capfd.readouterr() == ("", "")


def test_an_error_does_not_reach_the_terminal(
    number: OneNumber, server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    number.error = RuntimeError("a bug")
    assert fetch(server)[0] == 500
    number.error = None
    assert fetch(server)[0] == 200
    assert capfd.readouterr() == ("", "")


# -- a file -----------------------------------------------------------------------------------


def file_at(path: Path, number: OneNumber) -> MetricsFile:
    return MetricsFile(path, number.registry, lambda line: None)


@pytest.mark.parametrize("name", ["metrics", "metrics.txt", ".prom", "a.prom.tmp"])
def test_a_file_that_node_exporter_ignores_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"must end in \.prom"):
        check_file(Path(name))


def test_any_user_can_read_the_file_whatever_the_umask(tmp_path: Path, number: OneNumber) -> None:
    path = tmp_path / "a.prom"
    before = os.umask(0o077)
    try:
        file_at(path, number).write()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["a.prom"]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path, number: OneNumber) -> None:
    """Including those of its library, which end in a process and a thread number."""
    for left in (".a[1].prom.tmp", ".a[1].prom.tmp.17.140"):
        (tmp_path / left).write_text("half")
    file = file_at(tmp_path / "a[1].prom", number)
    file.start()
    file.stop()
    assert [one.name for one in tmp_path.iterdir()] == ["a[1].prom"]


def test_a_temporary_file_is_never_collected(
    tmp_path: Path, number: OneNumber, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []

    def failing(path: str, registry: CollectorRegistry) -> None:
        write_to_textfile(path, registry)
        names.extend(one.name for one in tmp_path.iterdir())
        raise OSError

    monkeypatch.setattr(outputs, "write_to_textfile", failing)
    with pytest.raises(OSError):
        file_at(tmp_path / "a.prom", number).write()
    assert names and not any(name.endswith(".prom") for name in names)


def test_a_link_is_replaced_and_not_followed(tmp_path: Path, number: OneNumber) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    for name in ("a.prom", ".a.prom.tmp"):
        (tmp_path / name).symlink_to(other)
    file_at(tmp_path / "a.prom", number).write()
    assert other.read_text() == "mine"
    assert not (tmp_path / "a.prom").is_symlink()


def test_a_reader_never_sees_half_a_file(tmp_path: Path, number: OneNumber) -> None:
    path, over = tmp_path / "a.prom", threading.Event()
    file = file_at(path, number)
    file.write()

    def write() -> None:
        for turn in range(200):
            number.value = turn % 2
            file.write()
        over.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not over.is_set():
        seen.add(path.read_text().splitlines()[-1])
    thread.join()
    assert seen <= {"number 0.0", "number 1.0"}


def test_the_file_is_rewritten_regularly_and_at_the_end(
    tmp_path: Path, number: OneNumber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "EVERY_SECONDS", 0.02)
    path = tmp_path / "a.prom"
    file = file_at(path, number)
    file.start()
    until(lambda: path.exists() and "number 1.0" in path.read_text(), "the first time")
    number.value = 2.0
    until(lambda: "number 2.0" in path.read_text(), "again")
    monkeypatch.setattr(outputs, "EVERY_SECONDS", ENDLESS)
    time.sleep(0.1)
    number.value = 3.0
    file.stop()
    assert "number 3.0" in path.read_text()


def test_a_missing_directory_is_reported_once_and_retried(
    tmp_path: Path, number: OneNumber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "EVERY_SECONDS", 0.01)
    directory, shown = tmp_path / "textfile", list[str]()
    path = directory / "a.prom"
    file = MetricsFile(path, number.registry, shown.append)
    file.start()
    until(lambda: shown, "the report of the failure")
    time.sleep(0.1)
    assert shown == [f"--metrics-file {path} cannot be written: No such file or directory"]
    directory.mkdir()
    until(path.exists, "the file in the restored directory")
    number.error = RuntimeError("a bug")
    time.sleep(0.05)
    number.error, number.value = None, 5.0
    until(lambda: "number 5.0" in path.read_text(), "another write after a bug")
    file.stop()
    assert not threads("metrics-file")


def test_stop_does_not_wait_for_a_disk_that_hangs(
    tmp_path: Path, number: OneNumber, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked = threading.Event(), threading.Event()

    def hang(path: str, registry: CollectorRegistry) -> None:
        asked.set()
        answers.wait(ENDLESS)
        raise OSError

    monkeypatch.setattr(outputs, "write_to_textfile", hang)
    monkeypatch.setattr(outputs, "FILE_STOP_SECONDS", 0.05)
    file = file_at(tmp_path / "a.prom", number)
    file.start()
    assert asked.wait(20)
    file.stop()
    [writer] = threads("metrics-file")  # it still hangs
    answers.set()
    writer.join(20)
    assert not writer.is_alive()


# -- as options and keys ----------------------------------------------------------------------


def job_file(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.toml"
    path.write_text(f'dir = "job"\nscript = "train.py"\n{text}')
    return ["--config", str(path)]


def test_options_of_run_and_keys_of_a_job_file(tmp_path: Path) -> None:
    text = f'metrics = 9400\nmetrics-file = "{tmp_path}/a.prom"\n'
    found = settings_of(job_file(tmp_path, text))
    assert found.metrics == ("127.0.0.1", 9400)
    assert found.metrics_file == tmp_path / "a.prom"
    found = settings_of([*job_file(tmp_path, 'metrics = "[::]:1"'), "--metrics", "0.0.0.0:2"])
    assert found.metrics == ("0.0.0.0", 2)
    found = settings_of(job_file(tmp_path, ""))
    assert (found.metrics, found.metrics_file) == (None, None)


def test_run_with_a_port_in_use_fails_before_the_launch(
    tmp_path: Path, server: MetricsServer
) -> None:
    port = address(server)[1]
    done = elastic_ckpt("run", *job_file(tmp_path, f"metrics = {port}\n"))
    assert done.returncode == 64
    assert f"metrics 127.0.0.1:{port}: Address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    journal = tmp_path / "job" / ".elastic-ckpt" / "journal"
    assert not list(journal.iterdir())


def elastic_ckpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from elastic_ckpt.cli.app import main\n"
        "try: main()\n"
        "finally: print('prometheus_client' in sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("options", "imported"), [([], "False"), (["--metrics", "0"], "True")])
def test_the_library_is_imported_only_by_a_run_with_metrics(
    tmp_path: Path, options: list[str], imported: str
) -> None:
    """A run is checked up to its launch; status never imports it."""
    (tmp_path / "train.py").touch()
    place, script = str(tmp_path / "job"), str(tmp_path / "train.py")
    code = (
        "import sys\n"
        "from elastic_ckpt.cli.run.command import settings_of\n"
        "from elastic_ckpt.supervisor.wiring import make_supervisor\n"
        "settings = settings_of(sys.argv[1:])\n"
        "supervisor = make_supervisor(settings, lambda line: None, lambda: settings)\n"
        "print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--dir", place, "--memory-dir", "off", *options, script],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [imported]
    assert elastic_ckpt("status", place).stdout.split()[-1] == "False"

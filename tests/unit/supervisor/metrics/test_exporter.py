"""Where the metrics are told: an address, a file; who holds whom up, and what it is asked with."""

from __future__ import annotations

import http.client
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import GaugeMetricFamily

from elastic_ckpt.cli.run.command import settings_of
from elastic_ckpt.errors import UsageError
from elastic_ckpt.supervisor.metrics import outputs
from elastic_ckpt.supervisor.metrics.exporter import check_file, parse_address
from elastic_ckpt.supervisor.metrics.outputs import AT_ONCE, MetricsFile, MetricsServer, replace

pytestmark = pytest.mark.one_torch

ROOT = Path(__file__).parents[4]
ENDLESS = 60


class Told:
    """A collector of one number."""

    def __init__(self) -> None:
        self.value = 1.0
        self.wrong: Exception | None = None
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        if self.wrong is not None:
            raise self.wrong
        yield GaugeMetricFamily("told", "A number", self.value)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def server(told: Told) -> Iterator[MetricsServer]:
    found = MetricsServer("127.0.0.1", 0, told.registry)
    found.start()
    yield found
    found.stop()
    assert not found._thread.is_alive()


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


def until(condition: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, what
        time.sleep(0.01)


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
def test_an_address(text: str, found: tuple[str, int]) -> None:
    assert parse_address(text) == found


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
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="is no PORT, HOST:PORT or"):
        parse_address(text)


def test_it_is_told_there(told: Told, server: MetricsServer) -> None:
    assert fetch(server) == (200, "# HELP told A number\n# TYPE told gauge\ntold 1.0\n")
    told.value = 2.0
    assert fetch(server)[1].endswith("told 2.0\n")


def test_an_address_that_is_taken_is_an_error(server: MetricsServer) -> None:
    host, port = address(server)
    with pytest.raises(UsageError, match=rf"--metrics {host}:{port}: .*in use.*: give another"):
        MetricsServer(host, port, CollectorRegistry())


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_of_another_host_is_an_error(host: str) -> None:
    with pytest.raises(UsageError, match=f"--metrics {host}:9400: .*give another address"):
        MetricsServer(host, 9400, CollectorRegistry())


def test_whoever_starts_again_at_once_can_listen_there(told: Told) -> None:
    """Connections of before still wait in the kernel."""
    first = MetricsServer("127.0.0.1", 0, told.registry)
    first.start()
    assert fetch(first)[0] == 200
    first.stop()
    second = MetricsServer(*address(first), told.registry)
    second.start()
    assert fetch(second)[0] == 200
    second.stop()


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_ipv6(told: Told) -> None:
    try:
        server = MetricsServer("::1", 0, told.registry)
    except UsageError as error:
        pytest.skip(f"needs IPv6: {error}")
    assert server.url.startswith("http://[::1]:")
    server.start()
    assert fetch(server)[0] == 200
    server.stop()


def test_whoever_says_nothing_keeps_nobody_waiting(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs._Handler, "timeout", ENDLESS)
    silent = [socket.create_connection(address(server)) for _ in range(AT_ONCE - 1)]
    assert fetch(server)[0] == 200
    for one in silent:
        one.close()


def test_no_more_than_so_many_at_once(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next one is hung up on; and there is room again when one has gone."""
    monkeypatch.setattr(outputs._Handler, "timeout", ENDLESS)
    silent = [socket.create_connection(address(server)) for _ in range(AT_ONCE)]
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


def test_whoever_says_nothing_is_hung_up_on(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outputs._Handler, "timeout", 0.05)
    with socket.create_connection(address(server), timeout=20) as silent:
        assert silent.recv(1) == b""
    with socket.create_connection(address(server), timeout=20) as halfway:
        halfway.sendall(b"GET /metr")
        assert halfway.recv(1) == b""
    assert capfd.readouterr() == ("", "")


def test_what_goes_wrong_is_not_told_to_the_terminal(
    told: Told, server: MetricsServer, capfd: pytest.CaptureFixture[str]
) -> None:
    told.wrong = RuntimeError("a bug")
    assert fetch(server)[0] == 500
    told.wrong = None
    assert fetch(server)[0] == 200
    assert capfd.readouterr() == ("", "")


# -- a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["metrics", "metrics.txt", ".prom", "a.prom.tmp"])
def test_a_file_that_would_not_be_collected(name: str) -> None:
    with pytest.raises(UsageError, match=r"must end in \.prom"):
        check_file(Path(name))


def test_everybody_may_read_the_file_whatever_the_umask_is(tmp_path: Path) -> None:
    path = tmp_path / "a.prom"
    before = os.umask(0o077)
    try:
        replace(path, b"told 1\n")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [one.name for one in tmp_path.iterdir()] == ["a.prom"]


def test_what_a_kill_left_is_replaced_and_never_collected(tmp_path: Path) -> None:
    left = tmp_path / ".a.prom.tmp"
    left.write_text("half")
    assert not left.name.endswith(".prom")
    replace(tmp_path / "a.prom", b"told 1\n")
    assert [one.name for one in tmp_path.iterdir()] == ["a.prom"]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("mine")
    for name in ("a.prom", ".a.prom.tmp"):
        (tmp_path / name).symlink_to(other)
    replace(tmp_path / "a.prom", b"told 1\n")
    assert other.read_text() == "mine"
    assert not (tmp_path / "a.prom").is_symlink()


def test_a_reader_never_sees_half_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.prom"
    contents = [bytes([65 + i]) * 200_000 for i in range(2)]
    replace(path, contents[0])
    over = threading.Event()

    def write() -> None:
        for turn in range(200):
            replace(path, contents[turn % 2])
        over.set()

    thread = threading.Thread(target=write)
    thread.start()
    seen = set()
    while not over.is_set():
        seen.add(path.read_bytes())
    thread.join()
    assert seen <= set(contents)


def test_it_is_written_again_and_again_and_at_the_end(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "EVERY_SECONDS", 0.02)
    path = tmp_path / "a.prom"
    file = MetricsFile(path, told.registry, lambda line: None)
    file.start()
    until(lambda: path.exists() and "told 1.0" in path.read_text(), "the first time")
    told.value = 2.0
    until(lambda: "told 2.0" in path.read_text(), "again")
    monkeypatch.setattr(outputs, "EVERY_SECONDS", ENDLESS)
    time.sleep(0.1)
    told.value = 3.0
    file.stop()
    assert "told 3.0" in path.read_text()


def test_a_directory_that_vanishes_is_said_once_and_written_when_it_is_back(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "EVERY_SECONDS", 0.01)
    place, said = tmp_path / "textfile", list[str]()
    path = place / "a.prom"
    file = MetricsFile(path, told.registry, said.append)
    file.start()
    until(lambda: said, "what is wrong")
    time.sleep(0.1)
    assert said == [f"--metrics-file {path} cannot be written: No such file or directory"]
    place.mkdir()
    until(path.exists, "that it is back")
    told.wrong = RuntimeError("a bug")
    time.sleep(0.05)
    told.wrong, told.value = None, 5.0
    until(lambda: "told 5.0" in path.read_text(), "that it goes on behind a bug")
    file.stop()
    assert not file._thread.is_alive()


def test_a_disk_that_hangs_does_not_hold_the_end_up(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, asked = threading.Event(), threading.Event()

    def hang(path: Path, data: bytes) -> None:
        asked.set()
        answers.wait(ENDLESS)

    monkeypatch.setattr(outputs, "replace", hang)
    monkeypatch.setattr(outputs, "FILE_STOP_SECONDS", 0.05)
    file = MetricsFile(tmp_path / "a.prom", told.registry, lambda line: None)
    file.start()
    assert asked.wait(20)
    file.stop()
    assert file._thread.is_alive()  # and nobody waits for it
    answers.set()
    file._thread.join(20)


# -- as options and keys ----------------------------------------------------------------------


def job_file(tmp_path: Path, text: str) -> list[str]:
    (tmp_path / "train.py").touch()
    path = tmp_path / "job.toml"
    path.write_text(f'dir = "job"\nscript = "train.py"\n{text}')
    return ["--config", str(path)]


def test_both_are_options_of_run_and_keys_of_a_job_file(tmp_path: Path) -> None:
    text = f'metrics = 9400\nmetrics-file = "{tmp_path}/a.prom"\n'
    found = settings_of(job_file(tmp_path, text))
    assert found.metrics == ("127.0.0.1", 9400)
    assert found.metrics_file == tmp_path / "a.prom"
    found = settings_of([*job_file(tmp_path, 'metrics = "[::]:1"'), "--metrics", "0.0.0.0:2"])
    assert found.metrics == ("0.0.0.0", 2)
    found = settings_of(job_file(tmp_path, ""))
    assert (found.metrics, found.metrics_file) == (None, None)


def test_a_port_that_is_taken_ends_run_before_anything_is_launched(
    tmp_path: Path, server: MetricsServer
) -> None:
    port = address(server)[1]
    done = elastic_ckpt("run", *job_file(tmp_path, f"metrics = {port}\n"))
    assert done.returncode == 64
    assert f"--metrics 127.0.0.1:{port}: Address already in use" in done.stderr
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
def test_the_library_is_imported_only_for_those_who_want_metrics(
    tmp_path: Path, options: list[str], imported: str
) -> None:
    """By a run up to the moment that it would launch; and never by status."""
    (tmp_path / "train.py").touch()
    place, script = str(tmp_path / "job"), str(tmp_path / "train.py")
    code = (
        "import sys, elastic_ckpt.cli.run.command as run\n"
        "settings = run.settings_of(sys.argv[1:])\n"
        "supervisor = run._supervisor(settings, lambda: settings)\n"
        "print('prometheus_client' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--dir", place, "--memory-dir", "off", *options, script],
        capture_output=True, text=True, timeout=60, cwd=ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [imported]
    assert elastic_ckpt("status", place).stdout.split()[-1] == "False"

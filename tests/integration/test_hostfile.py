"""One command on the first host of a hostfile; a fake ssh makes this host all others, too."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.cluster import Cluster, Node, small_cluster

pytestmark = pytest.mark.hosts

MARK = "HOSTFILE_TEST"
SSH = """\
#!/bin/sh
printf '%s\\n' "$@" > "{root}/called.$5"
if [ -e "{root}/unreachable.$5" ]; then
    echo "ssh: connect to host $5 port 22: Connection refused" >&2
    exit 255
fi
for line; do :; done
exec sh -c "$line"
"""


class First(Node):
    """The host on which the command runs."""

    def __init__(self, cluster: Cluster, name: str):
        super().__init__(cluster, name)
        file = cluster.root / "hosts"
        self.options = [
            "--node-name", name, "--hostfile", str(file), "--rdzv-endpoint", cluster.endpoint,
            "--name", "it's \"a\" job", *cluster.options,
        ]  # fmt: skip


def marked(root: Path) -> list[psutil.Process]:
    """Return all processes that the command started, on any host."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(root):
                found.append(process)
    return found


def wait_until_all_ended(root: Path, seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while left := marked(root):
        assert time.monotonic() < limit, [process.cmdline() for process in left]
        time.sleep(0.1)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three hosts; n1 is the first."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()
    (bin_directory / "ssh").write_text(SSH.format(root=tmp_path))
    (bin_directory / "ssh").chmod(0o700)
    monkeypatch.setenv("PATH", str(bin_directory), prepend=":")
    monkeypatch.setenv(MARK, str(tmp_path))
    (tmp_path / "hosts").write_text("# the first leads\nn1 slots=1\nn2 slots=1\nn3 slots=1\n")
    made = small_cluster(tmp_path, "")
    made.make = lambda name: First(made, name)
    try:
        with made:
            yield made
    finally:
        left = marked(tmp_path)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=10)


def printed(cluster: Cluster, host: str) -> str:
    """Return the output of a host that was started over ssh."""
    return (cluster.head.directory / ".elastic-ckpt" / "hosts" / f"{host}.log").read_text()


def exit_codes(cluster: Cluster) -> dict[str, int | None]:
    job = JobDirectory.at(cluster.head.directory)
    return {record.node: record.exit_code for record in job_records(job)}


def test_one_command_trains_on_all_hosts(cluster: Cluster) -> None:
    cluster.start("n1")
    cluster.finish("n1")
    cluster.assert_each_sample_once(3)
    wait_until_all_ended(cluster.root)
    assert exit_codes(cluster) == {"n1": 0, "n2": 0, "n3": 0}
    assert "started n2, n3 over ssh" in cluster.output()
    for host in ("n2", "n3"):
        words = (cluster.root / f"called.{host}").read_text().splitlines()
        assert words[:5] == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host]
        assert len(words) == 6 and sys.executable in words[5]
        assert 'joined it\'s "a" job, led by n1' in printed(cluster, host)


def test_notice_to_the_command_preempts_all_hosts(cluster: Cluster) -> None:
    cluster.start("n1")
    cluster.until_step(3, 12)
    cluster["n1"].process.send_signal(signal.SIGTERM)
    assert cluster["n1"].wait(50) == 75, cluster.output()
    assert cluster.head.view().newest_intact.reason == "emergency"
    cluster.start("n1")  # at once, as a service manager does
    cluster.until_training(3, beyond=1)
    cluster["n1"].process.send_signal(signal.SIGINT)
    assert cluster["n1"].wait(50) == 75, cluster.output()
    wait_until_all_ended(cluster.root)
    assert exit_codes(cluster) == {"n1": 75, "n2": 75, "n3": 75}


def test_unreachable_host_is_an_error(
    cluster: Cluster,
) -> None:
    (cluster.root / "unreachable.n3").touch()
    cluster.options += ["--rdzv-timeout", "2"]
    node = cluster.nodes["n1"] = cluster.make("n1")
    assert node.start().wait(60) == 70, cluster.output()
    refused = "n3 was not started: ssh exited with 255: ssh: connect to host n3 port 22: "
    assert refused in cluster.output()
    assert "; n2 will give up after 2 s: fix this, then rerun the same command" in cluster.output()
    wait_until_all_ended(cluster.root)
    assert exit_codes(cluster)["n2"] == 76, printed(cluster, "n2")
    assert " 2 s\n" in printed(cluster, "n2")  # it may lead, as the address is this host's


def test_unreachable_host_is_skipped_where_fewer_suffice(
    cluster: Cluster,
) -> None:
    (cluster.root / "unreachable.n3").touch()
    cluster.options += ["--nnodes", "2:3"]
    cluster.start("n1")
    cluster.finish("n1")
    assert "n3 was not started: ssh exited with 255: " in cluster.output()
    cluster.assert_each_sample_once(2)
    wait_until_all_ended(cluster.root)
    assert exit_codes(cluster) == {"n1": 0, "n2": 0}

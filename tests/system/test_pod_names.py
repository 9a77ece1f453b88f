"""Names as Kubernetes has them: a pod's name has an address only while the pod has one.

Hosts are network namespaces, whose ``/etc/hosts`` changes as the pods come and go.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.cluster import Node
from tests.hosts import Hosts, why_not
from tests.waiting import until

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "hosts")

SIZE, EPOCHS = 603, 3


class Pods(Hosts):
    """Hosts that know their own name, and those of the others while these are there."""

    def make(self, name: str) -> Node:
        node = super().make(name)
        node.prefix += ["KUBERNETES_SERVICE_HOST=10.96.0.1"]
        return node

    def begin(self, name: str) -> None:
        """Start a pod, without waiting for anything."""
        self.nodes[name] = self.make(name)
        self.nodes[name].start()

    def forget(self, gone: str) -> None:
        """Take a pod's name away from the others."""
        for name in self.names:
            if name != gone:
                lines = self._file(name).read_text().splitlines()
                kept = [line for line in lines if not line.endswith(f" {gone}")]
                self._file(name).write_text("\n".join(kept) + "\n")

    def publish(self, new: str, known: dict[str, str]) -> None:
        """Give the others a pod's name back, from the files as they were."""
        for name in self.names:
            lines = [line for line in known[name].splitlines() if line.endswith(f" {new}")]
            if name != new:
                self._file(name).write_text("\n".join([self._file(name).read_text(), *lines, ""]))

    def files(self) -> dict[str, str]:
        return {name: self._file(name).read_text() for name in self.names}

    def _file(self, name: str) -> Path:
        return Path("/etc/netns") / f"{self.tag}{name}" / "hosts"


def pods(root: Path, nnodes: str, *options: str) -> Pods:
    arguments = ("--epochs", str(EPOCHS), "--size", str(SIZE), "--pause", "0.06")
    return Pods(3, root, nnodes, *arguments, options=("--save-interval", "20", *options))


def test_first_pod_comes_last_goes_and_comes_back(tmp_path: Path) -> None:
    with pods(tmp_path, "2:3") as job:
        known = job.files()
        job.forget("h1")
        for name in ("h2", "h3"):
            job.begin(name)
            waits = "h1:29400 has no address yet: waiting up to 10 min"
            until(lambda name=name, waits=waits: waits in job[name].output(), waits)
        job.begin("h1")
        job.publish("h1", known)
        job.until_step(3, 25)
        before = job.head.view().incarnation
        job.lose("h1")
        job.forget("h1")
        job.until_training(2, beyond=before)
        view = job.head.view()
        assert view.supervisor.node in ("h2", "h3"), job.output()
        assert "cannot take the place" not in job.output()
        job.begin("h1")
        job.publish("h1", known)
        job.until_training(3, beyond=view.incarnation)
        job.finish("h1", "h2", "h3")
        for counter in job.used_per_epoch():
            assert set(counter) == set(range(SIZE))


def test_name_that_never_gets_an_address_ends_with_76(tmp_path: Path) -> None:
    with pods(tmp_path, "2:3", "--rdzv-timeout", "2") as job:
        job.forget("h1")
        began = time.monotonic()
        job.begin("h2")
        assert job["h2"].wait() == 76, job.output()
        assert 2 < time.monotonic() - began < 30
        assert "h1:29400 had no address for 2 s: see whether the pod" in job.output()


def test_signal_ends_the_wait_for_a_name(tmp_path: Path) -> None:
    with pods(tmp_path, "2:3") as job:
        job.forget("h1")
        job.begin("h2")
        until(lambda: "no address yet" in job["h2"].output(), "the wait")
        job["h2"].process.terminate()
        assert job["h2"].wait(20) == 76, job.output()

"""Several nodes of one job, each with a supervisor of its own."""

import json
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

from elastic_ckpt.jobdir.node_record import job_records
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.protocol.board import Board
from tests.job import MEMORY, SCRIPTS, Job, is_tracker
from tests.ports import free_port

STEADY = SCRIPTS / "steady.py"
SIZE, EPOCHS = 203, 3  # of a small cluster's data


class Node(Job):
    """One node; all of them share the job directory."""

    def __init__(self, cluster: "Cluster", name: str):
        super().__init__(
            cluster.root, *cluster.arguments, nproc=cluster.nproc, script=cluster.script
        )
        self.name = name
        self.log = cluster.root / f"log-{name}"
        self.options = [
            "--node-name", name, "--nnodes", cluster.nnodes,
            "--rdzv-endpoint", cluster.endpoint, *cluster.options,
        ]  # fmt: skip


class Cluster:
    """Nodes by name; on this host, unless a subclass puts them elsewhere."""

    def __init__(self, root: Path, nnodes: str, *arguments: str, nproc: int = 1, options=()):
        self.root = root
        self.nnodes = nnodes
        self.nproc = nproc
        self.calm = root / "calm"
        self.arguments = [*arguments, "--trace", str(root / "trace"), "--calm", str(self.calm)]
        self.script = STEADY
        self.options = list(options)
        self.endpoint = f"127.0.0.1:{free_port()}"
        self.nodes: dict[str, Node] = {}
        root.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_) -> None:
        for node in self.nodes.values():
            node.close()

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def start(self, *names: str) -> None:
        """Start nodes; the first one leads where none runs yet, and the others wait for it."""
        for name in names:
            alone = all(node.process.poll() is not None for node in self.nodes.values())
            node = self.nodes[name] = self.make(name)
            node.start()
            if alone:
                leads = node.process.pid
                node.until(
                    lambda view, pid=leads: view.supervisor and view.supervisor.pid == pid,
                    "the head's record",
                )

    def make(self, name: str) -> Node:
        return Node(self, name)

    @property
    def head(self) -> Node:
        """The first node that lives: the one that leads unless the job has moved."""
        nodes = list(self.nodes.values())
        return next((node for node in nodes if node.process.poll() is None), nodes[0])

    def until_training(self, nodes: int, beyond: int = 0):
        """Wait until ``nodes`` nodes train in an incarnation after ``beyond``."""
        return self.head.until(
            lambda view: (
                view.incarnation > beyond
                and view.state == "running"
                and len(view.workers) == nodes * self.nproc
                and all(worker.phase == "training" for worker in view.workers)
            ),
            f"training on {nodes} nodes after incarnation {beyond}",
        )

    def until_stepped(self, incarnation: int) -> float:
        """Return when all ranks of an incarnation had finished a step, on the monotonic clock."""

        def stepped(_) -> list[int]:
            records = job_records(JobDirectory.at(self.head.directory))
            boards = [
                Board.open(record.board, writable=False)
                for record in records
                if record.owner.is_alive() and record.incarnation == incarnation
            ]
            return [slot.marks.stepped for board in boards for slot in board.read_slots()]

        self.head.until(lambda view: stepped(view) and all(stepped(view)), "a step of all ranks")
        return max(stepped(None)) / 1e9

    def until_step(self, nodes: int, step: int):
        """Wait until all ranks of ``nodes`` nodes have finished ``step``."""
        return self.head.until(
            lambda view: (
                len(view.workers) == nodes * self.nproc
                and all(worker.step >= step for worker in view.workers)
            ),
            f"step {step} on {nodes} nodes",
        )

    def finish(self, *names: str, seconds: float = 240.0) -> None:
        """Let the job run to its end without pauses; each node must end with 0."""
        self.calm.touch()
        for name in names:
            assert self.nodes[name].wait(seconds) == 0, self.output()

    def lose(self, name: str) -> None:
        """Kill all processes of a node, as when its machine is switched off.

        Semaphore trackers are spared: they remove what the others leave in this host's memory.
        """
        tree = [process for process in self.nodes[name].tree() if not is_tracker(process)]
        for process in tree:
            process.send_signal(signal.SIGSTOP)  # so that no process reports the death of another
        for process in tree:
            process.send_signal(signal.SIGKILL)
        self.nodes[name].process.wait(30)

    def used_per_epoch(self) -> list[Counter]:
        """Count how often each sample was used, by epoch, in the steps of the final history."""
        done: dict[int, set[int]] = {}  # incarnations, by step
        lines = []
        for path in self.root.glob("trace.*"):
            for text in path.read_text().splitlines():
                try:
                    step, epoch, used, _, incarnation = json.loads(text)
                except ValueError:
                    continue  # its rank was killed while it wrote
                done.setdefault(step, set()).add(incarnation)
                lines.append((step, epoch, used, incarnation))
        assert sorted(done) == list(range(1, len(done) + 1))
        counts = self._history(done)
        epochs: dict[int, Counter] = {}
        for step, epoch, used, incarnation in lines:
            if counts[step] == incarnation:
                epochs.setdefault(epoch, Counter()).update(used)
        return [epochs[epoch] for epoch in sorted(epochs)]

    def _history(self, done: dict[int, set[int]]) -> dict[int, int]:
        """Return which incarnation did each step of the final history: the last one from its first
        step on, and before that the one that had saved there."""
        saved = {
            (one["data"]["step"], one["incarnation"])
            for one in self.head.events()
            if one["event"] == "saved"
        }
        counts: dict[int, int] = {}
        now = max(done[len(done)])
        for step in range(len(done), 0, -1):
            if now not in done[step]:
                before = [one for one in done[step] if one < now]
                now = max(before, key=lambda one, step=step: ((step, one) in saved, one))
            counts[step] = now
        return counts

    def assert_each_sample_once(self, ranks: int) -> None:
        """At the end of an epoch, fewer samples are used twice than there are ranks."""
        used = self.used_per_epoch()
        assert len(used) == EPOCHS
        for counter in used:
            assert set(counter) == set(range(SIZE))
            assert counter.total() - SIZE < ranks

    def noted(self, kind: str) -> list[dict]:
        """Return the data of the head's events of a kind, in order."""
        found = [one["data"] for one in self.head.events() if one["event"] == kind]
        return [one for one in found if not one.get("follows")]

    def output(self) -> str:
        return "\n".join(f"== {name}\n{node.output()}" for name, node in self.nodes.items())


class MemoryCluster(Cluster):
    """Nodes that have memory of their own each, as machines have."""

    def __enter__(self) -> "MemoryCluster":
        self.memory = Path(tempfile.mkdtemp(dir=MEMORY))
        return self

    def __exit__(self, *failed) -> None:
        try:
            super().__exit__(*failed)
        finally:
            shutil.rmtree(self.memory)

    def make(self, name: str) -> Node:
        node = super().make(name)
        node.memory = self.memory / name
        node.memory.mkdir(exist_ok=True)
        node.options += ["--memory-dir", str(node.memory)]
        return node


def small_cluster(root: Path, nnodes: str, *options: str, nproc: int = 1) -> Cluster:
    """Return a cluster that makes ten steps a second until a test calls ``finish``."""
    arguments = ("--epochs", str(EPOCHS), "--size", str(SIZE), "--pause", "0.12")
    options = ("--save-interval", "10", *options)
    return Cluster(root, nnodes, *arguments, nproc=nproc, options=options)

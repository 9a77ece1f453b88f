"""Nodes that share no directory: the ranks save to a bucket, and any other machines continue."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from torch.distributed import fsdp

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.attempt import local_files
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES
from elastic_ckpt.cli.run.bucket import local_directory
from elastic_ckpt.jobdir.paths import JobDirectory
from tests.cluster import EPOCHS, SIZE, Cluster, Node
from tests.job import SCRIPTS

sharded = pytest.mark.skipif(
    not hasattr(fsdp, "fully_shard"), reason="FSDP2 needs a GPU before torch 2.6"
)


class Machine(Node):
    """A node with a disk of its own."""

    def __init__(self, cluster: Machines, name: str) -> None:
        super().__init__(cluster, name)
        disk = cluster.root / f"disk-{name}"
        self.directory = local_directory(cluster.url, disk)
        self.options += ["--dir", str(cluster.url), "--local-dir", str(disk)]  # the last one counts


class Machines(Cluster):
    """Nodes whose bucket is a directory, which they use by its URL alone."""

    def __init__(self, root: Path, nnodes: str, *options: str, nproc: int = 1) -> None:
        arguments = ("--epochs", str(EPOCHS), "--size", str(SIZE), "--pause", "0.12")
        super().__init__(
            root, nnodes, *arguments, nproc=nproc, options=("--save-interval", "10", *options)
        )
        self.url = BucketUrl.parse(f"file://{root}/bucket")

    def make(self, name: str) -> Node:
        return Machine(self, name)

    def until_step(self, nodes: int, step: int) -> None:
        """As each machine sees its own ranks."""
        for node in list(self.nodes.values())[:nodes]:
            node.until(
                lambda view: (
                    len(view.workers) == self.nproc
                    and all(worker.step >= step for worker in view.workers)
                ),
                f"step {step}",
            )

    def forget(self) -> None:
        """Start with machines that know nothing of those before: they count incarnations anew."""
        for node in self.nodes.values():
            node.close()
        self.nodes.clear()
        for path in self.root.glob("trace.*"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            before = "".join(json.dumps([*line[:-1], 0]) + "\n" for line in lines)
            path.with_name(f"{path.name}.before").write_text(before)
            path.unlink()

    def events(self, kind: str) -> list[dict]:
        """Return the data of all nodes' events of a kind, in order."""
        found = [one for node in self.nodes.values() for one in node.events()]
        found.sort(key=lambda one: one["monotonic"])
        return [one["data"] for one in found if one["event"] == kind]

    def until_in_bucket(self, step: int) -> None:
        """Wait until the bucket has a step, or a later one."""

        def newest(_: object) -> int:
            found = self.newest()
            return found.step if found else 0

        self.head.until(lambda view: newest(view) >= step, f"step {step} in the bucket")

    def newest(self) -> catalog.SealKey | None:
        return catalog.newest(open_store(self.url, make=True))


@pytest.mark.hosts
def test_machines_that_vanish_are_replaced_by_others(tmp_path: Path) -> None:
    """Of another number, with other numbers of ranks, and with nothing but the bucket."""
    with Machines(tmp_path, "2") as machines:
        machines.start("n1", "n2")
        machines.until_in_bucket(20)
        for name in ("n1", "n2"):
            machines.lose(name)
        machines.forget()
        machines.nnodes, machines.nproc = "1", 3
        machines.start("n3")
        machines.finish("n3")
        machines.assert_each_sample_once(3)
        assert f"elastic-ckpt list {machines.url}" in machines["n3"].output()
        view = machines.head.view()
        assert (view.newest_intact.tier, view.newest_intact.reason) == ("bucket", "final")


@sharded
@pytest.mark.one_torch
def test_a_machine_of_a_sharded_job_brings_its_share(tmp_path: Path) -> None:
    """Two machines that have nothing continue; each needs one of two shards."""
    with Machines(tmp_path, "2") as machines:
        machines.script = SCRIPTS / "sharded.py"
        machines.start("n1", "n2")
        machines.until_in_bucket(10)
        for name in ("n1", "n2"):
            machines.lose(name)
        newest = machines.newest()
        assert newest is not None
        total = catalog.read_seal(open_store(machines.url), newest).total_bytes
        machines.forget()
        machines.start("n3", "n4")
        machines.until_step(2, newest.step + 1)
        for name in ("n3", "n4"):
            directory = local_files(JobDirectory.at(machines[name].directory), newest)
            here = sum(512 * one.lstat().st_blocks for one in directory.rglob("*.safetensors"))
            assert 0.45 < here / total < 0.7, f"{here} of {total}"
        machines.finish("n3", "n4")
        machines.assert_each_sample_once(2)


@sharded
@pytest.mark.slow
def test_ranks_that_find_damage_take_the_checkpoint_before_together(tmp_path: Path) -> None:
    """In a chunk that one of two ranks of a machine brings."""
    with Machines(tmp_path, "2") as machines:
        machines.script = SCRIPTS / "sharded.py"
        machines.start("n1", "n2")
        machines.until_in_bucket(20)
        for name in ("n1", "n2"):
            machines.lose(name)
        newest = machines.newest()
        assert newest is not None
        [shard] = (tmp_path / "bucket" / newest.data).glob("modeling/00001.safetensors")
        with shard.open("r+b") as file:
            file.seek(3 * CHUNK_BYTES)
            file.write(b"damaged!")
        machines.forget()
        machines.nnodes, machines.nproc = "1", 2
        machines.start("n3")
        machines.finish("n3")
        machines.assert_each_sample_once(2)
        [event] = [one for one in machines["n3"].events() if one["event"] == "quarantined"]
        assert "00001.safetensors does not match its checksum" in event["data"]["reason"]
        assert machines.head.view().restarts.failures == 0


@pytest.mark.one_torch
def test_a_crash_continues_from_memory_and_each_machine_uploads_its_part(tmp_path: Path) -> None:
    with Machines(tmp_path, "2") as machines:
        machines.start("n1", "n2")
        machines.until_step(2, 25)
        machines["n2"].workers()[0].send_signal(signal.SIGKILL)
        machines.head.until(lambda view: view.incarnation > 1, "another incarnation")
        machines.finish("n1", "n2")
        machines.assert_each_sample_once(2)
        first = machines.events("saved")[0]
        assert (first["tier"], first["path"]) == ("memory", f"{machines.url}/epoch-0_step-10")
        [loaded] = machines.events("loaded")
        saved = [one for one in machines.events("saved") if one["step"] == loaded["step"]]
        assert loaded["tier"] in {one["tier"] for one in saved}
        assert machines.events("drained") and not machines.events("drain_failed")
        assert machines.head.view().newest_intact.tier == "bucket"


@pytest.mark.slow
def test_functions_continue_from_memory(tmp_path: Path) -> None:
    """In a loop of the script's own, which reads where it stands from the checkpoint."""
    with Machines(tmp_path, "2") as machines:
        machines.script, results = SCRIPTS / "seed_shape.py", tmp_path / "results"
        machines.arguments = ["--engine", "torch", "--steps", "70", "--pause", "0.1"]
        machines.arguments += ["--results", str(results)]
        machines.options = ["--save-interval", "25"]
        machines.start("n1", "n2")
        machines.until_step(2, 28)
        machines["n2"].workers()[0].send_signal(signal.SIGKILL)
        machines.finish("n1", "n2")
        [loaded] = machines.events("loaded")
        assert (loaded["step"], loaded["tier"]) == (25, "memory"), machines.output()
        [line] = results.read_text().splitlines()
        assert json.loads(line)[0] == 25


@pytest.mark.hosts
def test_what_the_bucket_lacks_is_found_in_the_memory_of_machines_that_start_again(
    tmp_path: Path,
) -> None:
    """All supervisors are killed before a drain could end; the next run brings it to the bucket."""
    with Machines(tmp_path, "2") as machines:
        machines.start("n1", "n2")
        machines.until_in_bucket(10)
        seals = tmp_path / "bucket" / "seals"
        aside = seals.rename(tmp_path / "aside")
        seals.touch()  # so that nothing can be written there

        def newest_held() -> int:
            saved = machines.events("saved")
            return max(one["step"] for one in saved if one["tier"] == "memory")

        reached = machines.head.view().position.step
        machines.head.until(lambda _: newest_held() > reached, "a save into memory")
        for name in ("n1", "n2"):
            machines.lose(name)
        seals.unlink()
        aside.rename(seals)
        there, held = machines.newest(), newest_held()
        assert there is not None and there.step < held
        machines.start("n1", "n2")
        machines.until_step(2, held + 1)
        machines.finish("n1", "n2")
        loaded = machines.events("loaded")[-1]
        assert (loaded["step"], loaded["tier"]) == (held, "memory"), machines.output()
        assert held in [one["step"] for one in machines.events("drained")]
        machines.assert_each_sample_once(2)


@pytest.mark.one_torch
def test_a_preempted_machine_saves_with_all_ranks_and_the_others_continue(tmp_path: Path) -> None:
    with Machines(tmp_path, "1:2") as machines:
        machines.start("n1", "n2")
        machines.until_step(2, 15)
        machines.until_in_bucket(1)
        before = machines.newest()  # of the ranks that stopped to let the second machine join
        assert before is not None
        machines.until_step(2, before.step + 2)
        machines["n2"].process.send_signal(signal.SIGTERM)
        assert machines["n2"].wait(60) == 75, machines.output()
        assert "all ranks left together" in machines["n2"].output()
        after = machines.newest()
        assert after is not None and after.step > before.step
        machines.head.until(lambda view: view.incarnation > 1, "another incarnation")
        machines.finish("n1")
        machines.assert_each_sample_once(2)
        assert machines.head.view().restarts.failures == 0


@pytest.mark.hosts
@pytest.mark.parametrize("how", ["lost", pytest.param("preempted", marks=pytest.mark.slow)])
def test_next_machine_leads_and_the_former_one_joins_it(tmp_path: Path, how: str) -> None:
    with Machines(tmp_path, "1:2") as machines:
        machines.start("n1", "n2")
        machines.until_step(2, 25)
        began = time.monotonic()
        if how == "lost":
            machines.lose("n1")
        else:
            machines["n1"].process.send_signal(signal.SIGTERM)
            assert machines["n1"].wait() == 75, machines.output()
        second = machines["n2"]
        second.until(lambda _: "leads from now on" in second.output(), "the next head")
        until_it_trains(second)
        print(f"\n{how}: {time.monotonic() - began:.2f} s until the next head trains")
        machines.start("n1")
        until_it_trains(machines["n1"])
        assert "led by n2" in machines["n1"].output()
        machines.finish("n1", "n2")
        machines.assert_each_sample_once(2)


def until_it_trains(node: Node) -> None:
    node.until(
        lambda view: (
            view.state == "running" and any(one.phase == "training" for one in view.workers)
        ),
        "training",
    )

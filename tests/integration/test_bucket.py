"""A job in a bucket: any empty machine continues it to the bit. The bucket is a directory that
``file://`` uses as one; ``make test-storage`` does the same on a server of S3."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from tests.job import TINY, environment, kill_tree

pytestmark = pytest.mark.one_torch

BOUND = 120.0


class Bucket:
    """A bucket, and the machines that run its job: each has a disk and a memory of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = f"file://{root}/store"
        self.digest, self.notice = root / "digest", root / "notice"

    def command(self, machine: str, *options: str, place: tuple[str, ...] = ()) -> list[str]:
        disk, memory = self.root / machine, self.root / f"{machine}-memory"
        memory.mkdir(exist_ok=True)
        where = place or ("--dir", self.url, "--local-dir", str(disk))
        return [
            sys.executable, "-m", "elastic_ckpt", "run", *where, "--memory-dir", str(memory),
            "--nproc", "2", "--grace", "8", "--", str(TINY), "--interval", "5", "--pause", "0.01",
            "--digest", str(self.digest), "--notice-file", str(self.notice), *options,
        ]  # fmt: skip

    def start(self, machine: str, *options: str, place: tuple[str, ...] = ()) -> subprocess.Popen:
        log = open(self.root / f"{machine}.log", "ab")  # the child's
        with log:
            return subprocess.Popen(
                self.command(machine, *options, place=place), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, env=environment(),
            )  # fmt: skip

    def run(self, machine: str, *options: str, place: tuple[str, ...] = ()) -> int:
        process = self.start(machine, *options, place=place)
        try:
            return process.wait(BOUND)
        finally:
            end(process)

    def said(self, machine: str) -> str:
        return (self.root / f"{machine}.log").read_text()

    def newest(self) -> int:
        found = catalog.newest(open_store(BucketUrl.parse(self.url), make=True))
        return found.step if found else -1

    def until_sealed(self, step: int, process: subprocess.Popen) -> None:
        limit = time.monotonic() + BOUND
        while self.newest() < step:
            assert process.poll() is None, "it ended"
            assert time.monotonic() < limit
            time.sleep(0.1)

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", *arguments], capture_output=True, text=True,
            timeout=60, env=environment(), check=False,
        )  # fmt: skip


def end(process: subprocess.Popen) -> None:
    import psutil

    if process.poll() is None:
        kill_tree(psutil.Process(process.pid))
        process.wait(30)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed run."""
    plain = Bucket(tmp_path_factory.mktemp("plain"))
    place = ("--dir", str(plain.root / "job"))
    assert plain.run("plain", place=place) == 0, plain.said("plain")
    return plain.digest.read_text()


@pytest.mark.slow
def test_an_empty_machine_continues_to_the_bit(tmp_path: Path, expected: str) -> None:
    bucket = Bucket(tmp_path)
    prints = ("--chatty", str(tmp_path))
    assert bucket.run("one", "--notice", "17:step", *prints) == 75, bucket.said("one")
    assert bucket.newest() >= 16
    shown = bucket.ask("status", bucket.url, "--json")
    assert json.loads(shown.stdout)["step"] == bucket.newest()
    shutil.rmtree(tmp_path / "one")
    printed = bucket.ask("logs", bucket.url)
    assert "== incarnation 1, rank 1" in printed.stdout, printed.stderr
    assert "step 16 xxx" in printed.stdout
    page = bucket.ask("report", bucket.url, "-o", "-")
    assert "Yes: saved, and waiting" in page.stdout, page.stderr
    assert "In the bucket, " in page.stdout
    assert bucket.run("two") == 0, bucket.said("two")
    page = bucket.ask("report", bucket.url, "-o", "-")
    assert "Yes: it has finished" in page.stdout
    assert "2 runs, 2 incarnations" in page.stdout
    assert "is here, from file://" in bucket.said("two")
    assert bucket.digest.read_text() == expected
    assert bucket.ask("verify", "--full", bucket.url).returncode == 0


def test_a_second_machine_is_refused_and_one_that_vanished_is_taken_over(
    tmp_path: Path, expected: str
) -> None:
    bucket = Bucket(tmp_path)
    first = bucket.start("one", "--pause", "0.25")
    try:
        bucket.until_sealed(5, first)
        assert bucket.run("two") == 73
        assert "is alive: stop that one first" in bucket.said("two")
        bucket.until_sealed(10, first)
    finally:
        end(first)  # SIGKILL to all of it
    shutil.rmtree(tmp_path / "one")
    assert bucket.run("two") == 0, bucket.said("two")
    assert bucket.digest.read_text() == expected


@pytest.mark.slow
def test_what_is_not_in_the_bucket_is_not_called_saved(tmp_path: Path) -> None:
    """76 where the upload fails; this machine still has it, and a rerun brings it there."""
    bucket = Bucket(tmp_path)
    process = bucket.start("one", "--pause", "0.05")
    try:
        bucket.until_sealed(5, process)
        store, away = tmp_path / "store", tmp_path / "away"
        store.rename(away)
        store.write_text("no directory")
        process.send_signal(signal.SIGTERM)
        code = process.wait(BOUND)
        store.unlink()
        away.rename(store)
    finally:
        end(process)
    assert code == 76, bucket.said("one")
    assert "lacks it" in bucket.said("one")
    before = bucket.newest()
    assert bucket.run("one") == 0, bucket.said("one")
    assert bucket.newest() > before
    assert "from step" in bucket.said("one").rpartition("training")[2]


@pytest.mark.slow
def test_a_mirror_that_fails_does_not_stop_training(tmp_path: Path, expected: str) -> None:
    bucket = Bucket(tmp_path)
    job = tmp_path / "job"
    place = ("--dir", str(job), "--mirror", bucket.url)
    process = bucket.start("one", "--pause", "0.05", place=place)
    try:
        bucket.until_sealed(5, process)
        (tmp_path / "store").rename(tmp_path / "away")
        (tmp_path / "store").write_text("no directory")
        assert process.wait(BOUND + 60) == 0, bucket.said("one")
    finally:
        end(process)
    assert bucket.digest.read_text() == expected
    assert "mirror" in bucket.said("one")
    row = json.loads(bucket.ask("status", str(job), "--json").stdout)
    assert "failing" in row["mirror"] or "off" in row["mirror"]
    (tmp_path / "store").unlink()
    (tmp_path / "away").rename(tmp_path / "store")
    assert bucket.ask("push", str(job), bucket.url).returncode == 0
    final: dict[str, Any] = json.loads(bucket.ask("list", bucket.url, "--json").stdout)[0]
    assert final["reason"] == "final"


@pytest.mark.slow
def test_a_directory_that_was_left_behind_does_not_go_before_the_bucket(tmp_path: Path) -> None:
    """Its older checkpoints would become the newest."""
    bucket = Bucket(tmp_path)
    place = ("--dir", str(tmp_path / "job"), "--mirror", bucket.url)
    assert bucket.run("one", "--notice", "8:step", place=place) == 75, bucket.said("one")
    bucket.notice.unlink()
    assert bucket.run("two", "--notice", "16:step") == 75, bucket.said("two")
    bucket.notice.unlink()
    there = bucket.newest()
    assert bucket.run("one", place=place) == 73
    assert f"elastic-ckpt pull {bucket.url} {tmp_path / 'job'}" in bucket.said("one")
    assert bucket.ask("push", str(tmp_path / "job"), bucket.url).returncode == 73
    assert bucket.ask("pull", bucket.url, str(tmp_path / "job")).returncode == 0
    assert bucket.run("one", "--notice", f"{there + 4}:step", place=place) == 75
    assert bucket.newest() > there


@pytest.mark.slow
def test_going_back_takes_a_directory_and_the_bucket_follows(tmp_path: Path) -> None:
    """By the commands that the refusal of --from names."""
    bucket = Bucket(tmp_path)
    assert bucket.run("one", "--notice", "17:step") == 75, bucket.said("one")
    bucket.notice.unlink()
    target = "epoch-0_step-5"
    assert target in bucket.ask("list", bucket.url).stdout
    place = ("--dir", bucket.url, "--from", target)
    assert bucket.run("refused", place=place) == 64
    assert f"elastic-ckpt pull {bucket.url} DIR {target}" in bucket.said("refused")
    job = str(tmp_path / "job")
    assert bucket.ask("pull", bucket.url, job).returncode == 0
    assert bucket.ask("pull", bucket.url, job, target).returncode == 0
    place = ("--dir", job, "--from", target, "--mirror", bucket.url)
    assert bucket.run("back", "--notice", "9:step", place=place) == 75, bucket.said("back")
    assert f"continuing from {target}" in bucket.said("back")
    bucket.notice.unlink()
    assert 5 <= bucket.newest() < 16
    assert bucket.run("two", "--notice", "12:step") == 75, bucket.said("two")
    assert "from step" in bucket.said("two").rpartition("training")[2]

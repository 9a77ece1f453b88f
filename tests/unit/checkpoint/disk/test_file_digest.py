"""One pass gives the digest of a file and those of its chunks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xxhash

from elastic_ckpt.checkpoint.disk.file_digest import Digest, FileDigest, digest_bytes
from elastic_ckpt.checkpoint.disk.hashed_file import HashedFile, digest_file
from elastic_ckpt.checkpoint.manifest import CHUNK_BYTES, check_files

SIZES = [0, 5, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES,
         2 * CHUNK_BYTES + 77]  # fmt: skip


def some_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


def expected(data: bytes) -> Digest:
    chunks = [data[begin : begin + CHUNK_BYTES] for begin in range(0, len(data), CHUNK_BYTES)]
    found = tuple(map(xxhash.xxh3_128_hexdigest, chunks))
    return Digest(len(data), xxhash.xxh3_128_hexdigest(data), found if len(found) > 1 else ())


@pytest.mark.parametrize("size", SIZES)
def test_all_ways_of_hashing_agree(tmp_path: Path, size: int) -> None:
    data = some_bytes(size)
    assert digest_bytes(data) == expected(data)
    file = HashedFile(tmp_path / "file")
    file.write(data)
    assert file.finish() == expected(data)
    file.close()
    assert digest_file(tmp_path / "file") == expected(data)
    check_files([digest_bytes(data).entry("a/b", 3)])


@pytest.mark.parametrize("piece", [CHUNK_BYTES - 1, 3_000_001, CHUNK_BYTES + 1])
def test_how_the_bytes_are_cut_does_not_matter(piece: int) -> None:
    data = memoryview(some_bytes(3 * CHUNK_BYTES + 1))
    digest = FileDigest()
    for begin in range(0, len(data), piece):
        digest.update(data[begin : begin + piece])
    assert digest.finish() == expected(bytes(data)) == digest.finish()

"""The manifest of a checkpoint and of one rank's part of it: types, limits, decoding."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final, Literal, TypeVar

import msgspec
import xxhash

from elastic_ckpt.errors import CheckpointRejected, UnsupportedFormat
from elastic_ckpt.jobdir.paths import is_session_name
from elastic_ckpt.util.text import printable

FORMAT: Final = 2
"""2 since the order of samples has versions: a reader of format 1 would continue in its own."""

ORDER_VERSION: Final = 2
"""Newest version of the order of samples."""

MAX_MANIFEST_BYTES: Final = 128 * 1024 * 1024
"""Enough for 80,000 files of 45 TB in all, with a digest of each 16 MiB."""

MAX_FILES: Final = 200_000
"""Files of one checkpoint; this many with paths of 250 characters fit into a manifest."""

MAX_TEXT_CHARACTERS: Final = 1024
"""Of a name or a version in the header."""

MAX_PATH_CHARACTERS: Final = 1024
MAX_NAME_BYTES: Final = 255
CHUNK_BYTES: Final = 16 * 1024 * 1024
"""What the digests in ``FileEntry.chunks`` are of; part of the format."""

MAX_NUMBER: Final = 10**18 - 1
"""No count, position or size is larger; a directory's name holds as many digits."""

Reason = Literal["interval", "emergency", "final", "manual"]

_DIGEST = re.compile(r"[0-9a-f]{32}")
_COMMON_PATH = re.compile(r"[\w-][\w.,@=+-]{0,200}(?:/[\w-][\w.,@=+-]{0,200})*", re.ASCII)
"""Nearly all paths: a manifest of thousands of ranks is checked in half the time."""

_OWN = re.compile(rb'"manifest_xxh3_128": "([0-9a-f]{32})"')
_BLANK: Final = "0" * 32


class FileEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One file of a checkpoint.

    Attributes:
        path: relative to the checkpoint, normalised, with ``/``.
        bytes: size.
        xxh3_128: hexadecimal digest of the contents; empty only in the memory tier.
        rank: the rank that wrote it.
        chunks: the same digest of every ``CHUNK_BYTES`` of it, the last chunk excepted, which may
            be shorter; empty for a file of one chunk, in the memory tier, and from versions that
            did not write them.
    """

    path: str
    bytes: int
    xxh3_128: str
    rank: int
    chunks: tuple[str, ...] = ()


class EngineInfo(msgspec.Struct, frozen=True):
    """What wrote the model and optimizer state."""

    name: str
    version: str = ""
    plugin: str = ""
    precision: str = ""


class SealHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is, apart from its files.

    Attributes:
        attempt, incarnation, run: which attempt of which launch of which run wrote it; run 0 is of
            a version without run numbers.
        parent: the attempt that its run continued from; empty for a fresh start.
        order_version: as in ``Position``; format 1 does not have it.
        created: RFC 3339, UTC; for people, never for ordering.
        epoch, step, step_in_epoch, sample_start_index, order_seed, dataset_fingerprint,
            dataset_size, dataset_fields: as in ``Position``.
        samples_per_step: samples that one step consumes on all ranks together; 0 if unknown.
        world_size, data_parallel_size: ranks, and ranks that see different samples.
        metrics: what the script reported last, for retention by a metric.
        session: name of the session that saved it; empty for the unnamed one.
        automatic: neither the user nor the script chose when to save.
        session_order: sessions of the job that were opened before it, when it was opened last.
    """

    job: str
    attempt: str
    incarnation: int
    created: str
    reason: Reason
    epoch: int
    step: int
    step_in_epoch: int
    sample_start_index: int
    samples_per_step: int
    order_seed: int | None
    dataset_fingerprint: str
    dataset_size: int
    world_size: int
    data_parallel_size: int
    engine: EngineInfo
    torch: str
    metrics: dict[str, float] = {}
    dataset_fields: dict[str, str] = {}
    session: str = ""
    session_order: int = 0
    run: int = 0
    parent: str = ""
    automatic: bool = False
    order_version: int = 1

    @property
    def age(self) -> tuple[int, int, int]:
        """Orders the checkpoints of all sessions of a job: the newest has the largest."""
        return self.session_order, self.epoch, self.step

    @property
    def checkpoint_name(self) -> str:
        """The directory's name in the job directory."""
        return f"epoch-{self.epoch}_step-{self.step}"


class PartManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank wrote in one attempt; rank 0's part also has the header.

    ``manifest_xxh3_128`` is filled in by :func:`encode` and checked when it is decoded.
    """

    format: int = FORMAT
    attempt: str
    rank: int
    world_size: int
    files: list[FileEntry]
    header: SealHeader | None = None
    manifest_xxh3_128: str = _BLANK


class SealBody(SealHeader, frozen=True, kw_only=True):
    """What the seals of all tiers have: the header and the files."""

    format: int = FORMAT
    files: list[FileEntry]
    manifest_xxh3_128: str = _BLANK

    @property
    def total_bytes(self) -> int:
        """Bytes of all files that the seal lists."""
        return sum(entry.bytes for entry in self.files)


class Manifest(SealBody, frozen=True, kw_only=True):
    """The seal: once it stands in a directory, that directory is a checkpoint."""

    fingerprint: str


class _Format(msgspec.Struct):
    format: int


_Signed = TypeVar("_Signed", bound=msgspec.Struct)
"""A struct with ``format`` and ``manifest_xxh3_128``."""


def check_path(path: str) -> None:
    """Refuse every path that could lead out of the checkpoint: absolute, with ``..`` or ``.``, not
    normalised, too long, or with a character that has no business in a file name."""
    if len(path) <= MAX_PATH_CHARACTERS and _COMMON_PATH.fullmatch(path):
        return
    # What cannot be printed can steer a terminal or, a lone surrogate, cannot be encoded.
    if (
        not 0 < len(path) <= MAX_PATH_CHARACTERS
        or not path.isprintable()
        or "\\" in path
        or any(
            part in ("", ".", "..") or len(part.encode()) > MAX_NAME_BYTES
            for part in path.split("/")
        )
    ):
        raise CheckpointRejected(f"the manifest holds the unsafe path {path[:80]!r}")


def fingerprint(files: Iterable[FileEntry]) -> str:
    """Digest over the digests of all files, independent of their order in the list."""
    digest = xxhash.xxh3_128()
    for entry in sorted(files, key=lambda entry: entry.path):
        digest.update(f"{entry.path}\0{entry.bytes}\0{entry.xxh3_128}\n".encode())
    return digest.hexdigest()


def make_manifest(header: SealHeader, files: Iterable[FileEntry]) -> Manifest:
    """The seal of a checkpoint with these files."""
    listed = sorted(files, key=lambda entry: entry.path)
    return Manifest(**fields_of(header), files=listed, fingerprint=fingerprint(listed))


def header_of(seal: SealHeader) -> SealHeader:
    """Return the header alone of a seal: that of the same checkpoint in another tier."""
    return SealHeader(**fields_of(seal))


def fields_of(header: SealHeader) -> dict[str, Any]:
    """Return the fields of a header by name."""
    # Field by field: a manifest is a header, too.
    return {name: getattr(header, name) for name in SealHeader.__struct_fields__}


def encode(manifest: msgspec.Struct) -> bytes:
    """UTF-8 JSON with sorted keys, so that equal manifests are equal bytes.

    ``manifest_xxh3_128`` is the digest of these very bytes with zeros in its place: so no bit of
    a manifest can change without being noticed, be it in a key that this version does not know.
    """
    blank = msgspec.structs.replace(manifest, manifest_xxh3_128=_BLANK)
    return sign(msgspec.json.format(msgspec.json.encode(blank, order="sorted"), indent=1) + b"\n")


def sign(data: bytes) -> bytes:
    """Put the right digest into a manifest's ``manifest_xxh3_128``, whatever stands there."""
    blank = _OWN.sub(_own_line(_BLANK), data)
    return _OWN.sub(_own_line(xxhash.xxh3_128_hexdigest(blank)), blank)


def _own_line(digest: str) -> bytes:
    return f'"manifest_xxh3_128": "{digest}"'.encode()


def decode_manifest(data: bytes) -> Manifest:
    """Decode and check a seal.

    Raises:
        UnsupportedFormat: a newer version wrote it.
        CheckpointRejected: torn, too large, of the wrong shape, with unsafe paths, or with a
            fingerprint that its own list of files does not have.
    """
    manifest = decode_signed(data, Manifest)
    check_files(manifest.files)
    check_header(manifest)
    if fingerprint(manifest.files) != manifest.fingerprint:
        raise CheckpointRejected("the manifest's fingerprint does not match its files")
    return manifest


def decode_part(data: bytes) -> PartManifest:
    """Decode and check one rank's part; raises as :func:`decode_manifest` does."""
    part = decode_signed(data, PartManifest)
    check_files(part.files)
    if part.header is not None:
        check_header(part.header)
    return part


def check_header(header: SealHeader) -> None:
    """Raise CheckpointRejected for positions and sizes that no job has."""
    position = (
        header.epoch, header.step, header.step_in_epoch, header.sample_start_index,
        header.samples_per_step, header.dataset_size, header.incarnation, header.run,
        header.session_order,
    )  # fmt: skip
    if min(position) < 0:
        raise CheckpointRejected("the manifest holds a negative position")
    if max(*position, header.world_size, header.data_parallel_size) > MAX_NUMBER:
        raise CheckpointRejected("the manifest holds a position beyond any job's")
    if min(header.world_size, header.data_parallel_size) < 1:
        raise CheckpointRejected("the manifest is of a job of no ranks")
    if header.session and not is_session_name(header.session):
        raise CheckpointRejected("the manifest holds a session's name that no session has")
    if header.order_version > ORDER_VERSION:
        raise UnsupportedFormat("a newer version ordered its samples: upgrade elastic-ckpt")
    if header.order_version < 1:
        raise CheckpointRejected("the manifest holds an order of samples that has never been")
    if header.order_seed is not None and not -(2**63) <= header.order_seed < 2**64:
        raise CheckpointRejected("the manifest holds an order seed of more than 64 bits")
    engine = header.engine
    texts = (
        header.job, header.attempt, header.parent, header.created, header.dataset_fingerprint,
        header.torch,
        engine.name, engine.version, engine.plugin, engine.precision, *header.metrics,
        *header.dataset_fields, *header.dataset_fields.values(),
    )  # fmt: skip
    if max(map(len, texts)) > MAX_TEXT_CHARACTERS:
        raise CheckpointRejected(f"the manifest holds a name of over {MAX_TEXT_CHARACTERS}")


def decode_signed(data: bytes, kind: type[_Signed]) -> _Signed:
    """Decode what :func:`encode` wrote, once its own digest matches; raises as
    :func:`decode_manifest` does."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointRejected(f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    _check_own_digest(data)  # first: a flipped bit must not pass for a newer format
    try:
        version = msgspec.json.decode(data, type=_Format).format
        if version > FORMAT:
            raise UnsupportedFormat(
                f"format {min(version, 10**6)} is newer than this version reads ({FORMAT}): "
                "upgrade elastic-ckpt"
            )
        if version < 1:
            raise CheckpointRejected(f"the manifest's format {version} has never been")
        found = msgspec.json.decode(data, type=kind)
        return msgspec.structs.replace(found, manifest_xxh3_128=_BLANK)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        why = printable(str(error), 200)
        raise CheckpointRejected(f"the manifest is not readable: {why}") from None


def _check_own_digest(data: bytes) -> None:
    # A quote inside a JSON string is escaped, so no value can imitate the key.
    found = _OWN.findall(data)
    if len(found) != 1:
        raise CheckpointRejected("the manifest is torn or changed: it has no digest of its own")
    if sign(data) != data:
        raise CheckpointRejected("the manifest is torn or changed: its own digest does not match")


def check_files(files: list[FileEntry], *, digests: bool = True) -> None:
    """Raise CheckpointRejected for unsafe paths, sizes or digests; in memory there are none."""
    if len(files) > MAX_FILES:
        raise CheckpointRejected(f"the manifest lists more than {MAX_FILES} files")
    seen: set[str] = set()
    for entry in files:
        check_path(entry.path)
        if entry.path in seen:
            raise CheckpointRejected(f"the manifest lists {entry.path!r} twice")
        if not 0 <= entry.rank <= MAX_NUMBER:
            raise CheckpointRejected(f"the manifest's entry for {entry.path!r} is of no rank")
        digest = _DIGEST.fullmatch(entry.xxh3_128) if digests else entry.xxh3_128 == ""
        if not 0 <= entry.bytes <= MAX_NUMBER or not digest or not _has_chunks(entry, digests):
            raise CheckpointRejected(f"the manifest's entry for {entry.path!r} is malformed")
        seen.add(entry.path)


def _has_chunks(entry: FileEntry, digests: bool) -> bool:
    if not entry.chunks:
        return True
    return (
        digests
        and len(entry.chunks) == -(-entry.bytes // CHUNK_BYTES) > 1
        and all(map(_DIGEST.fullmatch, entry.chunks))
    )

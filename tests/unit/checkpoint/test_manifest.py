"""Manifests: what is written is read back, and what was not written by us is refused."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ckpt.checkpoint.manifest import (
    FORMAT,
    MAX_MANIFEST_BYTES,
    MAX_PATH_CHARACTERS,
    EngineInfo,
    FileEntry,
    Manifest,
    PartManifest,
    SealHeader,
    check_path,
    decode_manifest,
    decode_part,
    encode,
    fingerprint,
    make_manifest,
    sign,
)
from elastic_ckpt.errors import CheckpointRejected, ExitCode, UnsupportedFormat

HEADER = SealHeader(
    job="tested",
    attempt="a1b2",
    incarnation=3,
    created="2026-01-02T03:04:05Z",
    reason="emergency",
    epoch=1,
    step=120,
    step_in_epoch=20,
    sample_start_index=160,
    samples_per_step=8,
    order_seed=None,
    dataset_fingerprint="",
    dataset_size=203,
    world_size=2,
    data_parallel_size=2,
    engine=EngineInfo("torch", "2.9", precision="bf16"),
    torch="2.9",
)
FILES = [
    FileEntry("ranks/00001.json", 7, "2" * 32, 1),
    FileEntry("modeling/größe.safetensors", 2**40, "0123456789abcdef" * 2, 0),
]
MANIFEST = make_manifest(HEADER, FILES)
PART = PartManifest(attempt="a1b2", rank=0, world_size=2, files=FILES, header=HEADER)

Change = Callable[[dict[str, Any]], object]


def changed(change: Change, *, sealed: bool = False) -> bytes:
    """The manifest's JSON with a change and its own digest right.

    ``sealed`` puts the fingerprint right again, too.
    """
    content = json.loads(encode(MANIFEST))
    change(content)
    if sealed:
        content["fingerprint"] = fingerprint(msgspec.convert(content["files"], list[FileEntry]))
    return sign(json.dumps(content).encode())


def with_path(path: str) -> bytes:
    return changed(lambda content: content["files"][0].update(path=path), sealed=True)


# -- what is written ------------------------------------------------------------------------------


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    assert decode_manifest(encode(MANIFEST)) == MANIFEST
    assert decode_part(encode(PART)) == PART


def test_the_bytes_are_sorted_json_and_equal_for_equal_manifests() -> None:
    data = encode(MANIFEST)
    content = json.loads(data)
    assert list(content) == sorted(content)
    assert data.endswith(b"}\n")
    assert encode(make_manifest(HEADER, FILES[::-1])) == data


def test_manifest_properties() -> None:
    assert MANIFEST.total_bytes == 7 + 2**40
    assert MANIFEST.checkpoint_name == "epoch-1_step-120"
    assert [entry.path for entry in MANIFEST.files] == sorted(entry.path for entry in FILES)


def test_the_fingerprint_holds_paths_sizes_and_digests_but_not_their_order() -> None:
    path, size, digest, rank, _ = msgspec.structs.astuple(FILES[0])
    others = [
        [FileEntry(path + "x", size, digest, rank), FILES[1]],
        [FileEntry(path, size + 1, digest, rank), FILES[1]],
        [FileEntry(path, size, "3" * 32, rank), FILES[1]],
        FILES[:1],
        [],
    ]
    assert fingerprint(FILES) == fingerprint(FILES[::-1])
    assert len({fingerprint(FILES), *map(fingerprint, others)}) == len(others) + 1


# -- what is read ---------------------------------------------------------------------------------


def test_unknown_keys_are_ignored() -> None:
    def change(content: dict[str, Any]) -> None:
        content["later"] = {"deep": [1, None]}
        content["engine"]["later"] = 1
        content["files"][0]["later"] = "x"

    assert decode_manifest(changed(change)) == MANIFEST


def test_what_may_be_left_out() -> None:
    """Only what has a default; ``format`` is no such thing when it is read."""

    def change(content: dict[str, Any]) -> None:
        for key in ("version", "plugin", "precision"):
            del content["engine"][key]

    assert decode_manifest(changed(change)).engine == EngineInfo("torch")


ADDED = {
    "metrics", "dataset_fields", "session", "session_order", "automatic", "run", "parent",
    "order_version",
}  # fmt: skip
"""Keys that a checkpoint of an earlier version lacks."""


@pytest.mark.parametrize("key", sorted({*json.loads(encode(MANIFEST))} - ADDED))
def test_every_key_is_needed(key: str) -> None:
    with pytest.raises(CheckpointRejected):
        decode_manifest(changed(lambda content: content.pop(key)))


@pytest.mark.parametrize("key", sorted(json.loads(encode(MANIFEST))))
def test_every_key_has_its_type(key: str) -> None:
    wrong = {"order_seed": "5", "automatic": 1}.get(key, True)
    with pytest.raises(CheckpointRejected):
        decode_manifest(changed(lambda content: content.update({key: wrong})))


@pytest.mark.parametrize("version", [FORMAT + 1, 2**40, 10**60])
def test_a_newer_format_is_refused_whatever_else_it_holds(version: int) -> None:
    """A later format keeps the two keys that say so: its number and its own digest."""
    for data in (
        changed(lambda content: content.update(format=version)),
        sign(b'{"format": %d, "manifest_xxh3_128": "%s"}' % (version, b"0" * 32)),
    ):
        for decode in (decode_manifest, decode_part):
            with pytest.raises(UnsupportedFormat, match="newer"):
                decode(data)
    assert UnsupportedFormat.exit_code is ExitCode.DATA


def test_a_checkpoint_of_format_1_has_the_first_order() -> None:
    def change(content: dict[str, Any]) -> None:
        content.pop("order_version")
        content.update(format=1)

    assert decode_manifest(changed(change)).order_version == 1


def test_an_unknown_order_is_refused() -> None:
    """To continue in another one would repeat some samples and leave out others."""
    with pytest.raises(UnsupportedFormat, match="upgrade"):
        decode_manifest(changed(lambda content: content.update(order_version=3)))
    with pytest.raises(CheckpointRejected, match="has never been"):
        decode_manifest(changed(lambda content: content.update(order_version=0)))


@pytest.mark.parametrize("version", [0, -1])
def test_a_format_that_never_was_is_refused(version: int) -> None:
    with pytest.raises((CheckpointRejected, UnsupportedFormat)):
        decode_manifest(changed(lambda content: content.update(format=version)))


HOSTILE = [
    "",
    "/etc/passwd",
    "..",
    "../outside",
    "modeling/../../outside",
    "modeling/..",
    ".",
    "./modeling",
    "modeling/./a",
    "modeling//a",
    "modeling/",
    "a\\..\\b",
    "C:\\a",
    "a\0b",
    "a\nb",
    "a\x1b[31m",
    "a\x7f",
    "x" * (MAX_PATH_CHARACTERS + 1),
]


@pytest.mark.parametrize("path", HOSTILE)
def test_a_path_that_could_lead_astray_is_refused(path: str) -> None:
    with pytest.raises(CheckpointRejected, match="unsafe path"):
        check_path(path)
    with pytest.raises(CheckpointRejected, match="unsafe path"):
        decode_manifest(with_path(path))
    part = msgspec.structs.replace(PART, files=[FileEntry(path, 1, "0" * 32, 0)])
    with pytest.raises(CheckpointRejected, match="unsafe path"):
        decode_part(encode(part))


@pytest.mark.parametrize("path", ["a", "a/b", "..a/b..", "...", "größe/数", "a b", "x" * 255])
def test_an_odd_but_harmless_path_is_read(path: str) -> None:
    check_path(path)
    assert path in [entry.path for entry in decode_manifest(with_path(path)).files]


def test_a_refusal_does_not_repeat_a_path_at_full_length_or_raw() -> None:
    with pytest.raises(CheckpointRejected) as raised:
        check_path("a\n\x1b" * 10_000)
    message = str(raised.value)
    assert len(message) < 500
    assert message.isprintable()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content["files"].append(content["files"][0]), "twice"),
        (lambda content: content["files"][0].update(bytes=-1), "malformed"),
        (lambda content: content["files"][0].update(xxh3_128="0" * 31), "malformed"),
        (lambda content: content["files"][0].update(xxh3_128="0" * 33), "malformed"),
        (lambda content: content["files"][0].update(xxh3_128="0" * 32 + "\n"), "malformed"),
        (lambda content: content["files"][0].update(xxh3_128="G" * 32), "malformed"),
        (lambda content: content["files"][0].update(xxh3_128="A" * 32), "malformed"),
        (lambda content: content["files"][0].update(chunks=["0" * 32] * 2), "malformed"),
        (lambda content: content["files"][1].update(chunks=["0" * 32] * 2**16), "malformed"),
        (lambda content: content["files"][1].update(bytes=2**25, chunks=["0" * 32]), "malformed"),
        (
            lambda content: content["files"][1].update(bytes=2**25, chunks=["0" * 31] * 2),
            "malformed",
        ),
        (lambda content: content.update(step=-1), "negative position"),
        (lambda content: content.update(epoch=-1), "negative position"),
        (lambda content: content.update(sample_start_index=-1), "negative position"),
        (lambda content: content.update(reason="because"), "not readable"),
    ],
)
def test_a_seal_that_contradicts_itself_is_refused(change: Change, why: str) -> None:
    with pytest.raises(CheckpointRejected, match=why):
        decode_manifest(changed(change, sealed=True))


def test_a_manifest_without_digests_of_chunks_is_read() -> None:
    """As the versions before them wrote it."""
    data = encode(MANIFEST)
    assert b"chunks" not in data
    assert [entry.chunks for entry in decode_manifest(data).files] == [(), ()]
    large = FileEntry("modeling/large", 2**25 + 1, "1" * 32, 0, ("2" * 32, "3" * 32, "4" * 32))
    manifest = make_manifest(HEADER, [large])
    assert decode_manifest(encode(manifest)) == manifest
    assert manifest.fingerprint == fingerprint([msgspec.structs.replace(large, chunks=())])


@pytest.mark.parametrize("key", ["world_size", "data_parallel_size"])
def test_a_job_of_no_ranks_is_refused(key: str) -> None:
    """A load takes a rank's state modulo the world size."""
    with pytest.raises(CheckpointRejected):
        decode_manifest(changed(lambda content: content.update({key: 0})))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.update(fingerprint="0" * 32),
        lambda content: content.update(fingerprint=""),
        lambda content: content["files"].pop(),
        lambda content: content["files"][0].update(bytes=8),
        lambda content: content["files"][0].update(xxh3_128="3" * 32),
        lambda content: content["files"][0].update(path="ranks/00002.json"),
    ],
)
def test_a_list_of_files_that_is_not_the_fingerprint_s_is_refused(change: Change) -> None:
    with pytest.raises(CheckpointRejected, match="fingerprint"):
        decode_manifest(changed(change))


@pytest.mark.parametrize("decode", [decode_manifest, decode_part])
def test_a_torn_manifest_is_refused_at_every_length(decode: Callable[[bytes], object]) -> None:
    data = encode(MANIFEST if decode is decode_manifest else PART)
    for length in range(len(data)):
        with pytest.raises(CheckpointRejected, match="torn"):
            decode(data[:length])
        # A file system may also leave zeros where the end never reached the disk.
        with pytest.raises(CheckpointRejected, match="torn"):
            decode(data[:length].ljust(len(data), b"\0"))
    assert decode(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"format": null}',
        b'{"format": 1}',
        b'{"format": 1.5}',
        b'{"format": "\\ud800"}',
        b'{"format": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'\xef\xbb\xbf{"format": 1}',
        b'{"job": "\xed\xa0\x80", "format": 1}',
        b'{"later": ' + b"[" * 200_000 + b"]" * 200_000 + b', "format": 1}',
    ],
)
def test_other_bytes_are_refused(data: bytes) -> None:
    """As they are, and with a digest of their own that is right."""
    signed = sign(data[:-1] + b', "manifest_xxh3_128": "' + b"0" * 32 + b'"}')
    for decode in (decode_manifest, decode_part):
        with pytest.raises(CheckpointRejected, match="torn"):
            decode(data)
        with pytest.raises(CheckpointRejected, match="not readable"):
            decode(signed)


def test_a_manifest_that_is_too_large_is_not_even_parsed() -> None:
    data = encode(MANIFEST)
    padded = sign(data + b" " * (MAX_MANIFEST_BYTES - len(data)))
    assert decode_manifest(padded) == MANIFEST
    with pytest.raises(CheckpointRejected, match="larger than"):
        decode_manifest(padded + b" ")


# -- anything at all ------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


def survives(data: bytes) -> Manifest | None:
    """Decode what may be anything; only the two typed errors may come out."""
    try:
        return decode_manifest(data)
    except (CheckpointRejected, UnsupportedFormat):
        return None


@settings(max_examples=300, derandomize=True, database=None)
@given(st.binary(max_size=200))
def test_random_bytes(data: bytes) -> None:
    assert survives(data) is None


@settings(max_examples=300, derandomize=True, database=None)
@given(st.data())
def test_random_damage_to_a_manifest(data: st.DataObject) -> None:
    content = bytearray(encode(MANIFEST))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    changed_at_all = bytes(content) != encode(MANIFEST)
    assert (survives(bytes(content)) is None) is changed_at_all


def test_every_flipped_bit_of_a_manifest_is_noticed() -> None:
    data = encode(MANIFEST)
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        with pytest.raises(CheckpointRejected):
            decode_manifest(bytes(flipped))


def test_a_value_cannot_imitate_the_digest() -> None:
    """A name that looks like the key is not taken for it."""
    odd = '"manifest_xxh3_128": "' + "0" * 32 + '"'
    manifest = make_manifest(msgspec.structs.replace(HEADER, job=odd), FILES)
    assert decode_manifest(encode(manifest)).job == odd


@settings(max_examples=300, derandomize=True, database=None)
@given(st.data())
def test_random_values_in_a_manifest(data: st.DataObject) -> None:
    content = json.loads(encode(MANIFEST))
    places = [content, content["engine"], *content["files"]]
    place = data.draw(st.sampled_from(places))
    key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(_json)
    found = survives(sign(json.dumps(content).encode()))
    if found is not None:
        assert decode_manifest(encode(found)) == found


@settings(max_examples=300, derandomize=True, database=None)
@given(st.text(max_size=60, alphabet=st.sampled_from("ab./\\\0\n ~")))
def test_no_accepted_path_leads_out(path: str) -> None:
    try:
        check_path(path)
    except CheckpointRejected:
        return
    joined = posixpath.normpath(posixpath.join("/checkpoint", path))
    assert joined == "/checkpoint/" + path

"""Every decoder of the job directory: a value that keeps its promises, or the typed error.

What is fed to them: any bytes at all, and valid documents with values replaced, removed, added and
repeated, then with bits flipped or the end cut off. Manifests are signed again after that, so that
the code after the digest check is reached, too.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_ckpt.checkpoint import colossalai_layout as running_states
from elastic_ckpt.checkpoint import quarantine
from elastic_ckpt.checkpoint.colossalai_layout import decode_running_states
from elastic_ckpt.checkpoint.disk.part import DiskPart
from elastic_ckpt.checkpoint.manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    MAX_NUMBER,
    MAX_TEXT_CHARACTERS,
    EngineInfo,
    FileEntry,
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
from elastic_ckpt.checkpoint.ownership.job_lock import LockOwner, read_owner
from elastic_ckpt.checkpoint.quarantine import Rejected, rejected
from elastic_ckpt.checkpoint.verify import is_verified
from elastic_ckpt.errors import CheckpointRejected, UnsupportedFormat
from elastic_ckpt.jobdir.heartbeat import Heartbeat, read_heartbeat
from elastic_ckpt.jobdir.node_record import (
    NodeRecord,
    NoticeRecord,
    ProcessIdentity,
    read_record,
)
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.journal import journal as journals
from elastic_ckpt.journal.events import Unknown
from elastic_ckpt.journal.history import History
from elastic_ckpt.journal.journal import MAX_LINE_BYTES, Journal, read_journal
from elastic_ckpt.util.files import MAX_DEPTH, files_below, read_bounded
from elastic_ckpt.util.text import MAX_SHOWN, printable
from tests.checkpoints import make_checkpoint, open_job

HEADER = SealHeader(
    job="tested",
    attempt="0123456789abcdef",
    incarnation=3,
    created="2026-01-02T03:04:05Z",
    reason="interval",
    epoch=1,
    step=120,
    step_in_epoch=20,
    sample_start_index=160,
    samples_per_step=8,
    order_seed=5,
    dataset_fingerprint="numbers",
    dataset_size=203,
    world_size=2,
    data_parallel_size=2,
    engine=EngineInfo("torch", "2.9"),
    torch="2.9",
    metrics={"loss": 0.5},
)
ENTRIES = [FileEntry("ranks/00001.json", 7, "2" * 32, 1), FileEntry("lr_scheduler", 9, "3" * 32, 0)]
OWNER = ProcessIdentity("host", "boot", 12, 1.5)
RECORD = NodeRecord(
    job="tested",
    run_id="run",
    node="here",
    owner=OWNER,
    since=1.0,
    state="running",  # type: ignore[arg-type]
    incarnation=3,
    board="/proc/12/fd/7",
    exit_code=75,
    message="training",
    notice=NoticeRecord("signal", "SIGTERM", 9.5),
)


def document(value: Any) -> Any:
    return json.loads(msgspec.json.encode(value))


# -- what is fed ----------------------------------------------------------------------------------

RAW = {
    "@nan": "NaN",
    "@infinity": "-Infinity",
    "@large": "1e999",
    "@digits": "9" * 5000,
    "@deep": "[" * 5000 + "]" * 5000,
    "@dicts": '{"a":' * 3000 + "1" + "}" * 3000,
    "@control": '"\n"',
}
"""JSON that Python would not write, by the text that stands for it until the end."""

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, MAX_NUMBER, MAX_NUMBER + 1, 10**60, 0.5,
    -1e308, 1e308, "", "0", "x" * 70_000, "\0", "\x1b[31m\n", "\u009b31m", "\u202e", "\ud800",
    "../../outside", "/etc/hostname", [], {}, [[]], {"": None}, ["a", "a"],
    {"$": "tensor", "name": "a"}, {"$": []}, {"$": "dict", "items": [[[], 1]]}, *RAW,
]  # fmt: skip


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every value of a document, as the container that holds it and its key there."""
    if not isinstance(content, dict | list):
        return []
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    below = [place for key in keys for place in places(content[key])]
    return [(content, key) for key in keys] + below


@st.composite
def damaged(draw: Any, base: Any, *, bytes_too: bool = True) -> bytes:
    """A valid document with up to three values, and then some bytes, not as they should be."""
    content = [copy.deepcopy(base)]
    for _ in range(draw(st.integers(0, 3))):
        holder, key = draw(st.sampled_from(places(content)))
        match draw(st.sampled_from(["replace", "replace", "remove", "add", "swap"])):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
            case "remove" if isinstance(holder, dict):
                del holder[key]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["", "later", "$", "\ud800", "x" * 5000]))] = 1
            case "swap":
                other, place = draw(st.sampled_from(places(content)))
                holder[key] = copy.deepcopy(other[place])
    text = json.dumps(content[0])
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    if isinstance(base, dict) and text.startswith("{") and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(base)))
        text = f"{{{json.dumps(key)}: {json.dumps(draw(st.sampled_from(VALUES[:20])))}, {text[1:]}"
    data = bytearray(text.encode())
    if bytes_too and data:
        for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
            place = draw(st.integers(0, 8 * len(data) - 1))
            data[place // 8] ^= 1 << place % 8
        if draw(st.integers(0, 7)) == 0:
            del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def anything(base: Any) -> st.SearchStrategy[bytes]:
    return st.one_of(st.binary(max_size=300), damaged(base), damaged(base, bytes_too=False))


def fuzz(examples: int = 250) -> Any:
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobDirectory:
    return open_job(tmp_path_factory.mktemp("fuzz") / "job")


# -- manifests ------------------------------------------------------------------------------------


def assert_header(header: SealHeader) -> None:
    assert 0 <= header.epoch <= MAX_NUMBER and 0 <= header.step <= MAX_NUMBER
    assert 0 <= header.sample_start_index <= MAX_NUMBER and 0 <= header.incarnation <= MAX_NUMBER
    assert 1 <= header.world_size <= MAX_NUMBER
    assert header.order_seed is None or -(2**63) <= header.order_seed < 2**64
    assert len(header.job) <= MAX_TEXT_CHARACTERS >= len(header.engine.name)
    assert all(abs(value) <= 1.8e308 for value in header.metrics.values())


def assert_files(files: list[FileEntry]) -> None:
    for entry in files:
        check_path(entry.path)
        assert entry.path.isprintable() and 0 <= entry.bytes <= MAX_NUMBER
        assert len(entry.xxh3_128) == 32 and 0 <= entry.rank <= MAX_NUMBER
    assert len({entry.path for entry in files}) == len(files) <= MAX_FILES


def with_fingerprint(data: bytes) -> bytes:
    """Return the fingerprint of the list of files, if it has one."""
    try:
        content = json.loads(data)
        files = msgspec.convert(content["files"], list[FileEntry])
        content["fingerprint"] = fingerprint(files)
        return json.dumps(content).encode()
    except (ValueError, TypeError, KeyError, RecursionError, msgspec.MsgspecError):
        return data


@fuzz(500)
@given(anything(document(make_manifest(HEADER, ENTRIES))), st.booleans())
def test_any_bytes_as_a_manifest(data: bytes, right: bool) -> None:
    try:
        found = decode_manifest(sign(with_fingerprint(data) if right else data))
    except (CheckpointRejected, UnsupportedFormat) as error:
        assert len(str(error)) < 500 and str(error).isprintable()
        return
    assert_header(found)
    assert_files(found.files)
    assert found.fingerprint == fingerprint(found.files)
    assert decode_manifest(encode(found)) == found


PART = PartManifest(attempt="ab", rank=0, world_size=2, files=ENTRIES, header=HEADER)


@fuzz(500)
@given(anything(document(PART)))
def test_any_bytes_as_a_part(data: bytes) -> None:
    try:
        found = decode_part(sign(data))
    except (CheckpointRejected, UnsupportedFormat) as error:
        assert len(str(error)) < 500 and str(error).isprintable()
        return
    assert_files(found.files)
    if found.header is not None:
        assert_header(found.header)
    assert decode_part(encode(found)) == found


def many(count: int) -> bytes:
    files = [FileEntry(f"{number}", 1, "0" * 32, 0) for number in range(count)]
    return encode(make_manifest(HEADER, files))


def test_manifest_at_the_file_limit_is_read() -> None:
    assert len(decode_manifest(many(MAX_FILES)).files) == MAX_FILES
    with pytest.raises(CheckpointRejected, match=f"more than {MAX_FILES} files"):
        decode_manifest(many(MAX_FILES + 1))


def test_name_at_the_length_limit_is_read() -> None:
    def named(count: int) -> bytes:
        return encode(make_manifest(msgspec.structs.replace(HEADER, job="x" * count), ENTRIES))

    decode_manifest(named(MAX_TEXT_CHARACTERS))
    with pytest.raises(CheckpointRejected, match="a name of over"):
        decode_manifest(named(MAX_TEXT_CHARACTERS + 1))


@pytest.mark.parametrize("path", ["a\u009b31m", "a\u202eb", "a\ud800", "a\u2028b", "\ufeff"])
def test_unprintable_path_is_rejected(path: str) -> None:
    """Also where it does not come from JSON: a file name on the disk may be no UTF-8."""
    with pytest.raises(CheckpointRejected, match="unsafe path") as refusal:
        check_path(path)
    assert str(refusal.value).isprintable()


def test_file_size_is_checked_before_reading(tmp_path: Path) -> None:
    """A sparse file of a terabyte costs its maker nothing, and must not cost the reader more."""
    path = tmp_path / "manifest.json"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(OSError, match="larger than"):
        read_bounded(path, MAX_MANIFEST_BYTES)


# -- small records --------------------------------------------------------------------------------


@fuzz()
@given(anything({"epoch": 1, "step": 10, "sample_start_index": 80}))
def test_any_bytes_as_running_states(data: bytes) -> None:
    try:
        found = decode_running_states(data)
    except CheckpointRejected as error:
        assert running_states.NAME in str(error) and str(error).isprintable()
        assert len(str(error)) < 500
        return
    assert all(0 <= value <= MAX_NUMBER for value in msgspec.structs.astuple(found))


@fuzz(400)
@given(data=anything(document(RECORD)))
def test_any_bytes_as_a_node_record(job: JobDirectory, data: bytes) -> None:
    path = job.node_record("here")
    path.write_bytes(data)
    found = read_record(path)
    path.unlink()
    if found is None:
        return
    texts = [found.job, found.run_id, found.node, found.message, found.owner.host]
    assert all(text.isprintable() and len(text) <= MAX_SHOWN + 3 for text in texts)
    assert found.board in ("", f"/proc/{found.owner.pid}/fd/7")
    # The next run counts on from it, and what it then seals must be read again.
    assert 0 <= found.incarnation < MAX_NUMBER and 0 <= found.preemptions < MAX_NUMBER
    found.owner.is_alive()


@fuzz()
@given(data=anything(document(Heartbeat(1e9, 2, 30, 400))))
def test_any_bytes_as_a_heartbeat(job: JobDirectory, data: bytes) -> None:
    job.heartbeat("here").write_bytes(data)
    found = read_heartbeat(job, "here")
    if found is not None:
        assert 0 <= found.age_seconds < MAX_NUMBER
        assert all(0 <= value <= MAX_NUMBER for value in msgspec.structs.astuple(found))


def test_node_name_in_a_record_cannot_leave_the_directory(
    job: JobDirectory, tmp_path: Path
) -> None:
    outside = tmp_path / "outside.beat"
    outside.write_bytes(msgspec.json.encode(Heartbeat(1e9, 2, 30, 400)))
    for node in (str(outside.with_suffix("")), f"../../../{outside.stem}", ".."):
        assert read_heartbeat(job, node) is None


def test_record_can_name_only_its_owners_board(job: JobDirectory, tmp_path: Path) -> None:
    """Status opens it: another path may be a FIFO, or a file of another user."""
    path = job.node_record("here")
    for board in (str(tmp_path / "fifo"), "/proc/13/fd/7", "/proc/12/fd/7/../8", "/proc/12/mem"):
        path.write_bytes(msgspec.json.encode(msgspec.structs.replace(RECORD, board=board)))
        found = read_record(path)
        assert found is not None and found.board == ""
    path.unlink()


@fuzz()
@given(data=anything(document(LockOwner("run", 3, OWNER))))
def test_any_bytes_as_a_lock_owner(job: JobDirectory, data: bytes) -> None:
    job.lock.with_name("lock.owner").write_bytes(data)
    found = read_owner(job.lock)
    if found is not None:
        assert found.run_id.isprintable() and found.owner.host.isprintable()
        found.owner.is_alive()


@fuzz()
@given(data=anything(document(Rejected("/a", "a reason", "20260102T030405Z"))))
def test_any_bytes_as_a_quarantine_reason(job: JobDirectory, data: bytes) -> None:
    place = job.quarantine / "epoch-0_step-1-20260102T030405Z-abcd"
    place.mkdir(exist_ok=True)
    place.with_name(place.name + ".json").write_bytes(data)
    [found] = rejected(job)
    assert found.path == str(place)
    assert found.reason.isprintable() and len(found.reason) <= MAX_SHOWN + 3


def test_large_quarantine_shows_its_newest_entries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = open_job(tmp_path / "job")
    monkeypatch.setattr(quarantine, "MAX_SHOWN", 3)
    for number in range(5):
        record = job.quarantine / f"{number}.json"
        (job.quarantine / f"{number}").mkdir()
        record.write_bytes(msgspec.json.encode(Rejected("", f"{number}", f"{number}")))
        os.utime(record, (number, number))
    assert [found.reason for found in rejected(job)] == ["2", "3", "4"]


@fuzz()
@given(data=st.binary(max_size=100))
def test_any_bytes_as_a_verified_mark(job: JobDirectory, data: bytes) -> None:
    checkpoint = job.checkpoint(1, 120)
    (job.verified / checkpoint.name).write_bytes(data)
    manifest = make_manifest(HEADER, ENTRIES)
    assert is_verified(job, checkpoint, manifest) is (data == HEADER.attempt.encode())


EVENT = {
    "event": "saved", "wall": 10.5, "monotonic": 3.5, "node": "here", "pid": 3,
    "data": {"step": 7, "reason": "interval", "seconds": 1.5, "stall_seconds": 0.5, "epoch": 1},
}  # fmt: skip


@fuzz(400)
@given(lines=st.lists(anything(EVENT), max_size=4))
def test_any_bytes_as_a_journal(job: JobDirectory, lines: list[bytes]) -> None:
    from elastic_ckpt.cli.status.view import gather

    good = msgspec.json.encode(EVENT)
    job.journal("here").write_bytes(b"\n".join([good, *lines, good, b""]))
    events = read_journal(job)
    assert 2 <= len(events) <= 2 + sum(line.count(b"\n") + 1 for line in lines)
    History.of(events).account.goodput(20.0)
    view = gather(job)
    assert view.last_save is None or view.last_save.reason.isprintable()
    msgspec.json.encode(view)


def test_journal_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines, bytes of all nodes together, and events; the end is what counts."""
    job = open_job(tmp_path / "job")
    line = msgspec.json.encode(EVENT)
    long = msgspec.json.encode({**EVENT, "node": "x" * MAX_LINE_BYTES})
    job.journal("a").write_bytes(line + b"\n" + long + b"\n" + line)
    assert len(read_journal(job)) == 2
    monkeypatch.setattr(journals, "MAX_READ_BYTES", 2 * len(line) + 1)
    job.journal("a").write_bytes((line + b"\n") * 2)
    job.journal("b").write_bytes((line + b"\n") * 100)
    assert len(read_journal(job)) == 1
    monkeypatch.undo()
    monkeypatch.setattr(journals, "MAX_EVENTS", 7)
    assert len(read_journal(job)) == 7


def test_journal_of_empty_lines_takes_little_memory(job: JobDirectory) -> None:
    import tracemalloc

    job.journal("empty").write_bytes(b"\n" * (1024 * 1024))
    tracemalloc.start()
    read_journal(job)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    job.journal("empty").unlink()
    assert peak < 4 * 1024 * 1024


def test_oversized_event_is_still_written(tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    Journal(job, "here").write(Unknown(name="event", data={"deep": VALUES, "name": "\udce9"}))
    assert [event.name for event in read_journal(job)] == ["event"]


@fuzz()
@given(st.text(max_size=2000))
def test_printable_text_is_one_line_and_bounded(text: str) -> None:
    shown = printable(text, 100)
    assert shown.isprintable() and len(shown) <= 100 * 10 + 3
    assert printable(shown, len(shown)) == shown


def nested(root: Path, depth: int) -> None:
    root.joinpath(*["d"] * depth).mkdir(parents=True)
    root.joinpath(*["d"] * depth, "file").write_bytes(b"")


def test_directories_are_listed_down_to_the_limit(tmp_path: Path) -> None:
    nested(tmp_path / "allowed", MAX_DEPTH)
    assert len(files_below(tmp_path / "allowed")) == 1
    nested(tmp_path / "deeper", MAX_DEPTH + 1)
    with pytest.raises(OSError, match="nested deeper"):
        files_below(tmp_path / "deeper")


def test_unreadable_manifest_is_not_sealed(tmp_path: Path) -> None:
    job = open_job(tmp_path / "job")
    with pytest.raises(CheckpointRejected, match="a name of over"):
        make_checkpoint(job, 10, torch="x" * (MAX_TEXT_CHARACTERS + 1))
    assert not job.checkpoint(0, 10).exists()


# -- states ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Any], bytes]:
    """A state's directory, and its tree, tensors' header and data as they should be."""
    import torch

    from elastic_ckpt.training.tensors.state_codec import read_state, write_state

    directory = tmp_path_factory.mktemp("state")
    tree = {
        "tensors": [torch.ones(2, 3), torch.zeros(4, dtype=torch.int64)],
        "plain": (1, 2.5, None, b"bytes", {3: "three"}, {"a", "b"}),
        "empty": torch.zeros(0, 5),
        "array": torch.arange(3).numpy(),
    }
    write_state(DiskPart(directory, "a", 0), "s", tree)
    assert read_state(directory, "s")["plain"] == tree["plain"]
    data = (directory / "s.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return directory, json.loads((directory / "s.json").read_bytes()), header, data[8 + length :]


def read_or_refuse(directory: Path) -> Any:
    from elastic_ckpt.training.tensors.state_codec import read_state

    try:
        return read_state(directory, "s")
    except CheckpointRejected as error:
        assert str(error).isprintable() and len(str(error)) < 500
        return None


@fuzz(400)
@given(data=st.data())
def test_any_bytes_as_a_state_tree(state: Any, data: st.DataObject) -> None:
    directory, tree, _, _ = state
    before = (directory / "s.json").read_bytes()
    (directory / "s.json").write_bytes(data.draw(anything(tree)))
    try:
        read_or_refuse(directory)
    finally:
        (directory / "s.json").write_bytes(before)


@fuzz(400)
@given(data=st.data())
def test_any_bytes_as_a_tensor_file(state: Any, data: st.DataObject) -> None:
    """Names, types, shapes and offsets of the header; its length; and any bytes at all."""
    directory, _, header, body = state
    path = directory / "s.safetensors"
    before = path.read_bytes()
    text = data.draw(anything(header))
    length = data.draw(st.sampled_from([len(text)] * 8 + [0, 1, 2**32, 2**63, 2**64 - 1]))
    path.write_bytes(data.draw(st.sampled_from([struct.pack("<Q", length) + text + body, text])))
    try:
        read_or_refuse(directory)
    finally:
        path.write_bytes(before)


def empty_with_shape(shape: list[int]) -> bytes:
    header = {"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "shape", [[0, 2**62], [0, 2**63], [0, 2**64 - 1], [0] * 1000, [2**32, 2**32, 0], [2**62, 4]]
)
def test_empty_tensor_of_a_huge_shape_is_rejected(tmp_path: Path, shape: list[int]) -> None:
    (tmp_path / "s.json").write_bytes(b'{"$": "tensor", "name": "x"}')
    (tmp_path / "s.safetensors").write_bytes(empty_with_shape(shape))
    found = read_or_refuse(tmp_path)
    assert found is None or found.numel() == 0


def test_state_tree_depth_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer without the limit would leave a file that no reader accepts."""
    from elastic_ckpt.errors import UsageError
    from elastic_ckpt.training.tensors import state_codec

    monkeypatch.setattr(state_codec, "MAX_JSON_BYTES", 100)
    part = DiskPart(tmp_path, "a", 0)
    state_codec.write_state(part, "fits", "x" * 98)
    assert state_codec.read_state(tmp_path, "fits") == "x" * 98
    with pytest.raises(UsageError, match="101 bytes"):
        state_codec.write_state(part, "too-long", "x" * 99)
    (tmp_path / "fits.json").write_bytes(b'"' + b"x" * 99 + b'"')
    with pytest.raises(CheckpointRejected, match="larger than 100 bytes"):
        state_codec.read_state(tmp_path, "fits")


@pytest.mark.parametrize("name", ["s.json", "s.safetensors"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_state_is_read_from_regular_files_only(
    state: Any, tmp_path: Path, name: str, kind: str
) -> None:
    for path in state[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).rename(tmp_path / "moved")
    make: dict[str, Callable[[], object]] = {
        "link": lambda: (tmp_path / name).symlink_to("moved"),
        "fifo": lambda: os.mkfifo(tmp_path / name),
        "directory": lambda: (tmp_path / name).mkdir(),
    }
    make[kind]()
    assert read_or_refuse(tmp_path) is None

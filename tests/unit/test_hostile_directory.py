"""A job directory in which anything may stand: nothing outside of it is touched, nothing waits.

A tree beside the job is the canary. Its contents, modes, times and link counts are compared, and
an audit hook tells whether anything in it was opened, listed, made, moved or deleted.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from elastic_ckpt.checkpoint import verify
from elastic_ckpt.checkpoint.catalog import list_checkpoints, scan
from elastic_ckpt.checkpoint.cleanup import recover
from elastic_ckpt.checkpoint.disk.attempt import DiskAttempt
from elastic_ckpt.checkpoint.disk.tier import DiskTier
from elastic_ckpt.checkpoint.manifest import PartManifest, decode_part, encode, sign
from elastic_ckpt.checkpoint.ownership.job_lock import RunLocks
from elastic_ckpt.checkpoint.prune import prune
from elastic_ckpt.checkpoint.quarantine import set_aside
from elastic_ckpt.checkpoint.verify import mark_verified, read_manifest, verify_full, verify_quick
from elastic_ckpt.cli import app
from elastic_ckpt.errors import (
    CheckpointError,
    CheckpointRejected,
    DirectoryUnusable,
    ElasticCkptError,
    StorageFailed,
)
from elastic_ckpt.jobdir.node_record import NodeRecord, ProcessIdentity, read_record
from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.save_requests import ask_for_save, remove_requests, waiting_requests
from elastic_ckpt.journal.events import RunStarted, Saved, SaveFailure, Unknown
from elastic_ckpt.journal.journal import Journal, read_journal
from elastic_ckpt.policy.retention import Retention
from elastic_ckpt.protocol.run_state import RunState
from tests.checkpoints import (
    FILES,
    MODEL,
    bounded,
    change_manifest,
    make_attempt,
    make_checkpoint,
    make_header,
    open_job,
    seal_in_place,
)

# -- the canary -----------------------------------------------------------------------------------

_watched: list[tuple[str, list[str]]] = []
_EVENTS = {
    "open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir",
    "os.chmod", "os.truncate", "os.utime", "os.link", "os.symlink", "os.chown",
}  # fmt: skip


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event not in _EVENTS:
        return
    root, seen = _watched[-1]
    for argument in arguments[:2]:
        if isinstance(argument, str | bytes | os.PathLike):
            path = os.fsdecode(argument)
            follows = not (event == "open" and arguments[2] & os.O_NOFOLLOW)
            if event in ("os.remove", "os.rename", "os.symlink") or not follows:
                path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
            else:
                path = os.path.realpath(path)
            if path == root or path.startswith(root + os.sep):
                seen.append(f"{event} {path}")


sys.addaudithook(_hook)


def fingerprints(root: Path) -> dict[str, tuple[Any, ...]]:
    """Everything that an unwanted touch would change; not the time of the last read."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        contents = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(root))] = (
            contents, status.st_mode, status.st_uid, status.st_nlink, status.st_size,
            status.st_mtime_ns, status.st_ctime_ns,
        )  # fmt: skip
    return found


@contextlib.contextmanager
def untouched(outside: Path) -> Iterator[None]:
    before = fingerprints(outside)
    seen: list[str] = []
    _watched.append((os.path.realpath(outside), seen))
    try:
        yield
    finally:
        _watched.pop()
    assert seen == []
    assert fingerprints(outside) == before


def test_the_canary_detects_an_opened_path(tmp_path: Path) -> None:
    """A read through a link and a change of a mode are both noticed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to(outside)
    with pytest.raises(AssertionError, match="secret"), untouched(outside):
        (tmp_path / "link" / "secret").read_bytes()
    with pytest.raises(AssertionError), untouched(outside):
        (tmp_path / "link" / "secret").chmod(0o600)


# -- a job with one of everything -----------------------------------------------------------------

NEWEST = "epoch-0_step-20"
IDENTITY = "0123456789abcdef"
OPEN = f".attempts/30-{IDENTITY}"
DIRECTORIES = [
    ".attempts", ".quarantine", ".trash", ".elastic-ckpt", ".elastic-ckpt/verified",
    ".elastic-ckpt/requests", ".elastic-ckpt/nodes", ".elastic-ckpt/journal",
    ".elastic-ckpt/locks", NEWEST, f"{NEWEST}/modeling", f"{NEWEST}/parts", f"{NEWEST}/ranks",
    OPEN, f"{OPEN}/parts", f"{OPEN}/modeling", ".trash/epoch-0_step-1-12345678",
    ".quarantine/epoch-0_step-5-20260102T030405Z-abcd",
]  # fmt: skip
FILE_PLACES = [
    f"{NEWEST}/manifest.json", f"{NEWEST}/{MODEL}", f"{NEWEST}/parts/00000.json",
    f"{NEWEST}/running_states.json", f"{OPEN}/parts/00001.json", f"{OPEN}/{MODEL}",
    f"{OPEN}/manifest.json", f"{OPEN}/.tmp-manifest.json", ".tmp-left", ".elastic-ckpt/lock",
    ".elastic-ckpt/lock.owner", ".elastic-ckpt/.tmp-lock.owner", ".elastic-ckpt/locks/here",
    ".elastic-ckpt/nodes/here.json", ".elastic-ckpt/nodes/.tmp-here.json",
    ".elastic-ckpt/journal/here.jsonl", ".elastic-ckpt/requests/save-12345678",
    f".elastic-ckpt/verified/{NEWEST}", ".quarantine/.tmp-x", ".quarantine/unfinished.json",
    ".quarantine/epoch-0_step-5-20260102T030405Z-abcd.json",
]  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = open_job(tmp_path_factory.mktemp("template") / "job")
    make_checkpoint(job, 5)
    make_checkpoint(job, 10)
    newest = make_checkpoint(job, 20)
    mark_verified(job, newest, read_manifest(newest))
    aside = job.quarantine / "epoch-0_step-5-20260102T030405Z-abcd"
    job.checkpoint(0, 5).rename(aside)
    aside.with_name(aside.name + ".json").write_bytes(b'{"path":"","reason":"bad","at":"1"}')
    (job.trash / "epoch-0_step-1-12345678").mkdir()
    RunLocks(job, "here", "run").release()  # before: a run takes attempts over
    attempt = make_attempt(job, 30)
    for part in sorted((attempt.path / "parts").iterdir()):
        part.write_bytes(
            sign(part.read_bytes().replace(attempt.identity.encode(), IDENTITY.encode()))
        )
    attempt.path.rename(job.root / OPEN)
    Journal(job, "here").write(Saved(step=1, reason="interval", seconds=1.0))
    record().write(job.node_record("here"))
    job.lock.with_name("lock.owner").write_bytes(b"{}")
    ask_for_save(job).rename(job.requests / "save-12345678")
    for name in ("x", "unfinished.json"):
        (job.quarantine / (f".tmp-{name}" if name == "x" else name)).write_bytes(b"left")
    return job.root


def record(**changes: Any) -> NodeRecord:
    values: dict[str, Any] = {"incarnation": 1, "message": "training", **changes}
    owner = ProcessIdentity.current()
    return NodeRecord(
        job="tested", run_id="run", node="here", owner=owner, since=1.0, state=RunState.RUNNING,
        **values,
    )  # fmt: skip


@pytest.fixture
def job(template: Path, tmp_path: Path) -> JobDirectory:
    shutil.copytree(template, tmp_path / "job", symlinks=True)
    return JobDirectory.at(tmp_path / "job")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What lies beside the job, with names that something in the job would delete or read."""
    root = tmp_path / "outside"
    root.mkdir()
    for name in (".tmp-mine", "save-mine", "orphan.json", "secret", NEWEST):
        (root / name).write_bytes(b"{}")
    (root / "epoch-0_step-1-12345678").mkdir()
    (root / "epoch-0_step-1-12345678" / "mine").write_bytes(b"mine")
    (root / "here.json").write_bytes(msgspec.json.encode(record()))
    return root


# -- all that is done with a job's directory ------------------------------------------------------


def command(*arguments: str | Path) -> tuple[int, str]:
    """Return exit code and output; the output must be printable and without a traceback."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["elastic-ckpt", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = app._run()
    finally:
        sys.argv = argv
    text = out.getvalue() + err.getvalue()
    assert "Traceback" not in text
    assert all(line.isprintable() for line in text.splitlines())
    assert sum(line.startswith("elastic-ckpt: error") for line in text.splitlines()) <= 1
    return code, text


def run_and_recover(job: JobDirectory) -> None:
    """What a supervisor does before it launches anybody."""
    job.prepare(group_access=True)
    locks = RunLocks(job, "here", "run")
    try:
        recover(job)
        Journal(job, "here").write(RunStarted())
        read_record(job.node_record("here"))
        with contextlib.suppress(OSError):
            record().write(job.node_record("here"))
    finally:
        locks.release()


def everything(job: JobDirectory) -> None:
    """Typed errors alone, and of the system's the one that a command shows as its one line."""
    for arguments in (["list", "--json"], ["status", "--json"], ["verify", "--full"]):
        assert command(*arguments, job.root)[0] in (0, 1, 2, 65, 73)
    calls: list[Callable[[], object]] = [
        lambda: remove_requests(job, waiting_requests(job)),
        lambda: ask_for_save(job),
        lambda: Journal(job, "here").write(Unknown(name="event")),
        lambda: read_journal(job),
        lambda: prune(job, Retention(last=1)),
        lambda: recover(job),
        lambda: run_and_recover(job),
        lambda: [set_aside(job, path, "for the test") for path in scan(job)[:1]],
        lambda: make_attempt(job, 40),
    ]
    for call in calls:
        with contextlib.suppress(ElasticCkptError, OSError):
            call()
    command("verify", "--quarantine", job.root)
    command("list", job.root)
    command("status", job.root)


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("place", [*DIRECTORIES, *FILE_PLACES])
def test_link_is_not_followed(job: JobDirectory, outside: Path, place: str) -> None:
    """Whatever the link leads to would fit: it is the very thing that stood there."""
    path = job.root / place
    target = outside / "moved"
    if os.path.lexists(path):
        path.rename(target)
    else:
        target.write_bytes(b"")
    if target.is_dir():
        for entry in sorted(outside.iterdir()):
            if entry != target and not (target / entry.name).exists():
                copy = shutil.copytree if entry.is_dir() else shutil.copy
                copy(entry, target / entry.name)  # type: ignore[operator]
    path.symlink_to(target)
    with untouched(outside):
        bounded(lambda: everything(job), path)


@pytest.mark.parametrize("place", [*DIRECTORIES, *FILE_PLACES])
@pytest.mark.parametrize("kind", ["fifo", "other"])
def test_other_kinds_of_files_are_rejected_without_waiting(
    job: JobDirectory, outside: Path, place: str, kind: str
) -> None:
    """A FIFO; and a file where a directory belongs, a full directory where a file does."""
    path = job.root / place
    clear(path)
    if kind == "fifo":
        os.mkfifo(path)
    elif place in DIRECTORIES:
        path.write_bytes(b"")
    else:
        path.mkdir()
        (path / "inside").write_bytes(b"")
    with untouched(outside):
        bounded(lambda: everything(job), path, seconds=60)


SOME = [NEWEST, f"{NEWEST}/manifest.json", f"{NEWEST}/{MODEL}", f"{OPEN}/parts/00001.json",
        ".elastic-ckpt/lock", ".elastic-ckpt/nodes/here.json", ".elastic-ckpt/journal/here.jsonl",
        ".quarantine/epoch-0_step-5-20260102T030405Z-abcd.json"]  # fmt: skip


@pytest.mark.parametrize("place", SOME)
@pytest.mark.parametrize("kind", ["socket", "device", "circle", "dangling"])
def test_odd_things_in_some_places(
    job: JobDirectory, outside: Path, place: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = job.root / place
    clear(path)
    if kind == "socket":
        monkeypatch.chdir(path.parent)  # a socket's path must be short
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    elif kind == "device":
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 7))  # /dev/full
        except PermissionError:
            pytest.skip("only root makes devices")
    else:
        path.symlink_to(path if kind == "circle" else outside / "missing")
    with untouched(outside):
        bounded(lambda: everything(job), path)


@pytest.mark.parametrize("place", [place for place in FILE_PLACES if "/.tmp-" not in place])
def test_hard_link_is_not_written_through(job: JobDirectory, outside: Path, place: str) -> None:
    """A hard link in the job: what it shares its contents with keeps them, and its mode."""
    path, target = job.root / place, outside / "secret"
    target.write_bytes(path.read_bytes() if path.is_file() else b"mine\n")
    clear(path)
    path.hardlink_to(target)
    before = (target.read_bytes(), target.stat().st_mode, target.stat().st_mtime_ns)
    everything(job)
    assert (target.read_bytes(), target.stat().st_mode, target.stat().st_mtime_ns) == before


# -- what must still work beside it ---------------------------------------------------------------


def test_directory_named_like_a_leftover_does_not_stop_a_start(job: JobDirectory) -> None:
    for place in (job.root, job.quarantine, job.root / OPEN):
        (place / ".tmp-directory").mkdir()
    (job.quarantine / "directory.json").mkdir()
    assert recover(job) == [(job.checkpoint(0, 30), "sealed")]


def test_link_in_place_of_a_directory_is_named(job: JobDirectory, outside: Path) -> None:
    clear(job.trash)
    job.trash.symlink_to(outside)
    done = {one.path.name: one for one in prune(job, Retention(last=1))}
    assert done["epoch-0_step-10"].keep and "is a link" in done["epoch-0_step-10"].why
    clear(job.quarantine)
    job.quarantine.symlink_to(outside)
    with pytest.raises(DirectoryUnusable, match="is a link"):
        set_aside(job, job.checkpoint(0, 10), "bad")
    (job.checkpoint(0, 10) / MODEL).unlink()
    code, text = command("verify", "--quarantine", job.root)
    assert code == 73 and text.count("elastic-ckpt: error") == 1


def test_group_access_is_not_given_through_a_link(job: JobDirectory, outside: Path) -> None:
    clear(job.trash)
    outside.chmod(0o700)
    job.trash.symlink_to(outside)
    with untouched(outside), pytest.raises(DirectoryUnusable, match="is a link"):
        job.prepare(group_access=True)


def test_thousands_of_junk_entries_are_skipped(job: JobDirectory) -> None:
    places = (job.root, job.attempts, job.requests, job.control / "nodes", job.trash)
    for number in range(1000):
        for place in places:
            (place / f"junk-{number}.json").write_bytes(b"")
        (job.root / f"epoch-{number}_step-x").mkdir()
    newest = list_checkpoints(job)[0]
    assert newest.intact and newest.path.name == NEWEST
    assert recover(job) == [(job.checkpoint(0, 30), "sealed")]
    assert command("status", "--json", job.root)[0] in (0, 1, 2)


@pytest.fixture
def swept(job: JobDirectory) -> Iterator[None]:
    """Behind trees that neither shutil nor pytest can delete."""
    yield
    subprocess.run(["rm", "-rf", str(job.root)], check=True)


@pytest.mark.usefixtures("swept")
def test_directories_deeper_than_pythons_recursion_limit(job: JobDirectory) -> None:
    """A tree deeper than Python's stack, in a checkpoint, an attempt, the trash."""
    for place in (job.checkpoint(0, 20), job.root / OPEN, job.trash / "epoch-0_step-1-12345678"):
        here = os.open(place, os.O_RDONLY)
        for _ in range(1500):
            os.mkdir("d", dir_fd=here)
            below = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = below
        os.close(here)
    with pytest.raises(CheckpointRejected, match="nested deeper"):
        verify_quick(job.checkpoint(0, 20))
    [(_, what)] = recover(job)
    assert what.startswith("removed: nested deeper")


HOSTILE_NAMES = ["a\nb", "\x1b[2J", "\u009b31m", "caf\udce9", "\u202e", "x" * 250]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_names_cannot_steer_a_terminal(job: JobDirectory, name: str) -> None:
    """In a checkpoint, in quarantine, among records; ``command`` looks at what is printed."""
    (job.checkpoint(0, 20) / "modeling" / name).write_bytes(b"")
    (job.quarantine / name).mkdir()
    (job.quarantine / f"{name[:240]}.json").write_bytes(b"{}")
    hostile = name.encode(errors="replace").decode()
    record(message=hostile, incarnation=2).write(job.node_record(name[:200]))
    Journal(job, "here").write(SaveFailure(reason=hostile, error=f"{hostile}\x1b[31m"))
    for arguments in (["list"], ["list", "--json"], ["status"], ["status", "--json"],
                      ["verify"], ["verify", "--json"], ["prune", "--keep-last", "1"]):  # fmt: skip
        command(*arguments, job.root)
    code, text = command("verify", "--quarantine", job.root)
    assert code == 65 and "is not in the manifest" in text


def test_status_opens_no_path_named_in_a_record(job: JobDirectory, outside: Path) -> None:
    """A FIFO for a board would keep it for ever."""
    fifo = outside / "fifo"
    os.mkfifo(fifo)
    record(board=str(fifo)).write(job.node_record("here"))
    with untouched(outside):
        assert bounded(lambda: command("status", "--json", job.root)[0], fifo) in (0, 1, 2)
        with contextlib.suppress(ElasticCkptError):
            command("save", "--timeout", "0", job.root)


def test_fifo_as_a_board_does_not_block(job: JobDirectory) -> None:
    """The owner's descriptor is opened, and is not a board."""
    reader, writer = os.pipe()
    try:
        board = f"/proc/{os.getpid()}/fd/{reader}"
        record(board=board).write(job.node_record("here"))
        code, text = command("status", "--json", job.root)
        assert code in (0, 1, 2) and '"workers":[]' in text
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("incarnation", [-1, 2**70, 10**18 - 1])
def test_unreadable_attempt_is_not_sealed_by_the_next_run(
    job: JobDirectory, incarnation: int
) -> None:
    path = job.node_record("here")
    path.write_bytes(
        path.read_bytes().replace(b'"incarnation": 1', b'"incarnation": %d' % incarnation)
    )
    assert read_record(path) is None


# -- attempts and checkpoints with false claims ---------------------------------------------------


def rewrite_part(job: JobDirectory, rank: int, change: Callable[[PartManifest], Any]) -> None:
    path = job.root / OPEN / "parts" / f"{rank:05d}.json"
    path.write_bytes(encode(change(decode_part(path.read_bytes()))))


def add(entry_of: int, rank: int = 1, path: str | None = None) -> Callable[[PartManifest], Any]:
    def change(part: PartManifest) -> Any:
        entry = part.files[entry_of]
        entry = msgspec.structs.replace(entry, path=path or entry.path, rank=rank)
        return msgspec.structs.replace(part, files=[*part.files, entry])

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (add(0), "twice"),
        (add(0, path="parts/00001.json"), "twice"),
        (add(0, path="parts/00000.json"), "twice"),
        (add(0, path="ranks/00000.json"), "twice"),
        (add(0, rank=0, path=MODEL), "another rank"),
        (add(0, path="manifest.json"), "is missing"),
        (add(0, path="running_states.json/x"), "is missing"),
    ],
)
def test_contradicting_parts_are_not_sealed(
    job: JobDirectory, change: Callable[[PartManifest], Any], why: str
) -> None:
    """Each is signed. Sealed, the checkpoint would be refused by the next load."""
    rewrite_part(job, 1, change)
    [(_, what)] = recover(job)
    assert what.startswith("removed") and why in what
    assert not job.checkpoint(0, 30).exists()


def test_attempt_claiming_a_billion_ranks_is_rejected(job: JobDirectory) -> None:
    for rank in (0, 1):
        rewrite_part(
            job, rank, lambda part: msgspec.structs.replace(
                part, world_size=10**9,
                header=part.header and msgspec.structs.replace(part.header, world_size=10**9),
            )
        )  # fmt: skip
    [(_, what)] = recover(job)
    assert what == "removed: part 0 contradicts itself about the world size"


def test_sealed_checkpoint_claiming_a_billion_ranks_is_listed(job: JobDirectory) -> None:
    """The number is of no use to who verifies."""
    change_manifest(job.checkpoint(0, 20), world_size=10**9, data_parallel_size=10**9)
    verify_full(job.checkpoint(0, 20))
    assert command("list", job.root)[0] == 0


def test_attempt_named_for_another_step_is_removed(job: JobDirectory) -> None:
    (job.root / OPEN).rename(job.attempts / f"31-{IDENTITY}")
    [(_, what)] = recover(job)
    assert what.startswith("removed: its manifest is of another")


def test_sealed_attempt_of_another_step_is_removed(job: JobDirectory) -> None:
    clear(job.root / OPEN)
    attempt = DiskAttempt.begin(job, 50)
    seal_in_place(attempt)
    change_manifest(attempt.path, step=51)
    [(_, what)] = recover(job)
    assert what.startswith("removed") and not job.checkpoint(0, 51).exists()


def test_non_ascii_digits_are_not_a_checkpoint_name(job: JobDirectory) -> None:
    (job.root / "epoch-\u0660_step-\u0669\u0669").mkdir()
    assert [path.name for path in scan(job)] == [NEWEST, "epoch-0_step-10"]


@pytest.mark.parametrize(
    "name", ["running_states.json", "modeling/x", "optimizer/x", "ranks/x", "precision/x"]
)
def test_unlisted_file_is_rejected_where_it_would_be_read(tmp_path: Path, name: str) -> None:
    job = open_job(tmp_path / "job")
    contents = {path: data for path, data in FILES.items() if path != "running_states.json"}
    checkpoint = make_checkpoint(job, 10, contents=contents)
    verify_quick(checkpoint)
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_bytes(b"{}")
    with pytest.raises(CheckpointRejected, match=f"{name} is not in the manifest"):
        verify_quick(checkpoint)


def test_stray_manifest_does_not_hide_checkpoints(job: JobDirectory) -> None:
    """Otherwise only that checkpoint in the job's own directory would be verified."""
    shutil.copytree(job.checkpoint(0, 10), job.root, dirs_exist_ok=True)
    (job.checkpoint(0, 20) / MODEL).unlink()
    code, text = command("verify", job.root)
    assert code == 65 and f"{NEWEST}: FAILED" in text


def test_owned_paths_are_below_the_job(job: JobDirectory, outside: Path) -> None:
    assert job.owns(job.verified) and not job.owns(outside) and not job.owns(Path("/"))


def test_link_inside_a_checkpoint_is_rejected(job: JobDirectory) -> None:
    checkpoint = job.checkpoint(0, 20)
    (checkpoint / "optimizer").rename(checkpoint / "moved")
    (checkpoint / "optimizer").symlink_to("moved")
    with pytest.raises(CheckpointRejected, match="through a link"):
        verify_quick(checkpoint)


@pytest.mark.parametrize("size", [100, verify._OPENING_BYTES, 5 * 1024 * 1024])
def test_growing_file_is_read_up_to_a_limit(tmp_path: Path, size: int) -> None:
    from elastic_ckpt.checkpoint.disk.hashed_file import hash_file

    path = tmp_path / "grows"
    path.write_bytes(b"x" * size)

    def grow(count: int) -> None:
        assert path.stat().st_size < 20 * size + 2**26, "it would have gone on"
        with path.open("ab") as file:
            file.write(b"x" * count)

    assert hash_file(path, grow)[0] > size


# -- loading --------------------------------------------------------------------------------------


def runtime_of(job: JobDirectory) -> Any:
    from elastic_ckpt.training.ranks.peers import Peers

    journal = Journal(job, "here")
    return SimpleNamespace(
        has_looked=False,
        job=job,
        journal=journal,
        peers=Peers(0, 1, None, 10.0),
        say=lambda line: None,
        memory=None,
        bucket=None,
        durable=DiskTier(job),
        home=str(job.home),
    )


class Reader:
    """An engine that does something at the moment of the load."""

    def __init__(self, act: Callable[[Path], object] = lambda path: None) -> None:
        from elastic_ckpt.checkpoint.manifest import EngineInfo

        self.info = EngineInfo("torch")
        self.act = act

    def load(self, directory: Path) -> str:
        self.act(directory)
        return ""


def load(job: JobDirectory, path: Path, engine: Reader | None = None) -> Any:
    from elastic_ckpt.training.state.load import load_given

    return load_given(runtime_of(job), engine or Reader(), path)  # type: ignore[arg-type]


def linked_directory(checkpoint: Path, outside: Path) -> None:
    (checkpoint / "modeling").rename(outside / "modeling")
    (checkpoint / "modeling").symlink_to(outside / "modeling")


def renamed(checkpoint: Path, outside: Path) -> None:
    change_manifest(checkpoint, step=21)


def unlisted(checkpoint: Path, outside: Path) -> None:
    (checkpoint / "modeling" / "pytorch_model.bin.index.json").write_bytes(b"{}")


def linked_manifest(checkpoint: Path, outside: Path) -> None:
    (checkpoint / "manifest.json").rename(outside / "manifest.json")
    (checkpoint / "manifest.json").symlink_to(outside / "manifest.json")


def fifo_for_manifest(checkpoint: Path, outside: Path) -> None:
    (checkpoint / "manifest.json").unlink()
    os.mkfifo(checkpoint / "manifest.json")


@pytest.mark.parametrize(
    "damage", [linked_directory, renamed, unlisted, linked_manifest, fifo_for_manifest]
)
def test_load_rejects_what_listing_rejects(
    job: JobDirectory, outside: Path, damage: Callable[[Path, Path], None]
) -> None:
    """Hashes alone would match in the first three."""
    pytest.importorskip("torch")
    checkpoint = job.checkpoint(0, 20)
    load(job, checkpoint)
    damage(checkpoint, outside)

    def refused() -> None:
        with pytest.raises(CheckpointRejected):
            load(job, checkpoint, Reader(lambda path: pytest.fail("it was loaded")))

    with untouched(outside):
        bounded(refused, checkpoint / "manifest.json")


@pytest.mark.parametrize("how", ["write", "link", "fifo", "remove"])
def test_change_between_verification_and_load_is_detected(
    job: JobDirectory, outside: Path, how: str
) -> None:
    """Through its other name; or because something else takes its place."""
    pytest.importorskip("torch")
    checkpoint = job.checkpoint(0, 20)
    path, other = checkpoint / MODEL, outside / "other-name"
    other.hardlink_to(path)

    def change(_: Path) -> None:
        if how == "write":
            other.write_bytes(other.read_bytes()[::-1])
            return
        path.unlink()
        if how == "link":
            path.symlink_to(other)
        elif how == "fifo":
            os.mkfifo(path)

    def refused() -> None:
        with pytest.raises(CheckpointRejected, match="changed while it was loaded"):
            load(job, checkpoint, Reader(change))

    bounded(refused, path)


def test_lock_of_a_reader_does_not_block_pruning(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any reader of a manifest may lock it; the lock must not protect the checkpoint."""
    pytest.importorskip("torch")
    import fcntl

    from elastic_ckpt.checkpoint.ownership import read_lock as reading
    from elastic_ckpt.training.state import load as loading

    monkeypatch.setattr(reading, "_PATIENCE_SECONDS", 0.05)
    with (job.checkpoint(0, 20) / "manifest.json").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(StorageFailed, match="keeps it locked"):
            loading.load_newest(runtime_of(job), Reader())  # type: ignore[arg-type]
        assert command("verify", "--full", "--quarantine", job.root)[0] == 65
    assert [path.name for path in scan(job)] == [NEWEST, "epoch-0_step-10"]
    found = loading.load_newest(runtime_of(job), Reader())  # type: ignore[arg-type]
    assert found is not None and found.seal.step == 20


class Bomb:
    """Creates a directory when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


BOMB_PLACES = [
    "modeling/state.json", "modeling/state.safetensors", "optimizer/state.json",
    "optimizer/state.safetensors", "lr_scheduler/state.json", "ranks/00000.json",
    "ranks/00000.safetensors", "running_states.json",
]  # fmt: skip


@pytest.mark.parametrize("seal", ["none", "wrong", "right"])
@pytest.mark.parametrize("place", BOMB_PLACES)
def test_without_a_booster_nothing_is_unpickled(tmp_path: Path, place: str, seal: str) -> None:
    """Not even if the attacker who planted the pickle has sealed the checkpoint."""
    torch = pytest.importorskip("torch")
    from elastic_ckpt.checkpoint.colossalai_layout import read_running_states
    from elastic_ckpt.training.engines.torch.engine import TorchEngine
    from elastic_ckpt.training.state.candidate import Readable
    from elastic_ckpt.training.state.load import load_given
    from elastic_ckpt.training.state.rank_state import read_rank_state
    from elastic_ckpt.training.tensors.state_codec import write_state

    job, mark = open_job(tmp_path / "job"), tmp_path / "executed"
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    plain = {"modeling": model, "optimizer": optimizer, "lr_scheduler": scheduler}
    made = DiskAttempt.begin(job, 10)
    part = made.part(0)
    for name, thing in plain.items():
        write_state(part, f"{name}/state", thing.state_dict())
    write_state(part, "ranks/00000", {"rng": {}, "extra": {}})
    part.write("running_states.json", b'{"epoch":0,"step":10,"sample_start_index":80}')
    contents = {name: (made.path / name).read_bytes() for name in part.paths}
    made.drop()
    bomb = pickle.dumps(Bomb(mark))

    def read(checkpoint: Path) -> None:
        engine = TorchEngine(model, optimizer, scheduler)

        def resume(found: Readable) -> str:
            read_rank_state(found, 0)
            read_running_states(found.path)
            return ""

        load_given(runtime_of(job), engine, checkpoint, resume)

    def sealed(contents: dict[str, bytes]) -> Path:
        attempt = DiskAttempt.begin(job, 10)
        header = make_header(attempt, world_size=1)
        part = attempt.part(0)
        for name, data in contents.items():
            part.write(name, data)
        return attempt.publish(header, part.finish(1, header))

    checkpoint = sealed({**contents, place: bomb} if seal == "right" else contents)
    if seal == "wrong":
        read(checkpoint)
    if seal != "right":
        (checkpoint / place).write_bytes(bomb)
    if seal == "none":
        (checkpoint / "manifest.json").unlink()
    with pytest.raises(CheckpointError) as refusal:
        read(checkpoint)
    assert str(refusal.value).isprintable()
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists()  # it would have gone off

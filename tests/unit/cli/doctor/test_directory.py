"""The file system of a directory, from mount tables as kernels print them."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.cli.doctor.filesystem import check_filesystem, mount_of

TABLE = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
30 27 0:27 / /dev/shm rw,nosuid - tmpfs tmpfs rw,size=24684092k
40 27 0:40 / /data rw,noatime shared:5 master:7 - nfs4 server:/export rw,vers=4.2,local_lock=none
41 27 0:41 / /data/blind rw - nfs server:/old rw,vers=3,nolock,local_lock=all
42 27 8:1 / /data/my\040disk\134 rw - xfs /dev/sda1 rw
43 27 0:43 / /var/lib rw - overlay overlay rw,lowerdir=/a
44 27 0:44 / /s3 rw - fuse.s3fs s3fs rw
45 27 0:45 / /s4 rw - fuse mountpoint-s3 rw
46 27 0:46 / /lustre rw - lustre 10.0.0.1@tcp:/fs rw,localflock
47 27 8:2 / /cd ro,relatime - ext4 /dev/sdb ro
48 27 0:48 / /odd rw - oddfs odd rw
49 27 8:3 / /twice rw - ext4 /dev/sdc rw
50 49 8:4 / /twice rw - xfs /dev/sdd rw
51 27 0:51 / /datax rw - btrfs /dev/sde rw
52 27 0:52 / /super rw - ext4 /dev/sdf ro,noload
53 27 0:53 / /bare rw - ext4 /dev/sdg rw,nobarrier
54 27 0:54 / /bare2 rw - btrfs /dev/sdh rw,space_cache=v2,nobarrier,subvol=/
55 27 0:55 / /fast rw - overlay overlay rw,lowerdir=/a,volatile
56 27 0:56 / /fast2 rw - overlay overlay rw,lowerdir=/a,fsync=volatile
57 27 0:57 / /flash rw - f2fs /dev/sdi rw,fsync_mode=nobarrier
58 27 0:58 / /old rw - ext2 /dev/sdj rw
broken line
"""
LOSES = "a crash or power cut can lose sealed checkpoints"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(TABLE)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("/", "/"),
        ("/home/me", "/"),
        ("/data", "/data"),
        ("/data/job", "/data"),
        ("/data/blind/job", "/data/blind"),
        ("/database", "/"),
        ("/datax/job", "/datax"),
        ("/data/my disk\\/job", "/data/my disk\\"),
        ("/data/my disk", "/data"),
    ],
)
def test_the_longest_mount_point_wins(proc: Path, path: str, place: str) -> None:
    found = mount_of(path, proc)
    assert found is not None and found.point == place


def test_a_later_mount_covers_an_earlier_one(proc: Path) -> None:
    found = mount_of("/twice/x", proc)
    assert found is not None and (found.kind, found.source) == ("xfs", "/dev/sdd")


@pytest.mark.parametrize(
    ("path", "state", "says"),
    [
        ("/home", "ok", "ext4 (/dev/vda on /), local"),
        ("/data/x", "ok", "nfs4 (server:/export on /data), shared"),
        ("/data/blind", "warning", "local_lock=all: nodes do not see each other's locks"),
        ("/lustre", "warning", "localflock"),
        ("/var/lib/ckpt", "warning", "is lost with the container"),
        ("/dev/shm/ckpt", "warning", "lost with this machine"),
        ("/s3/ckpt", "problem", "object store"),
        ("/s4/ckpt", "problem", "object store"),
        ("/cd/ckpt", "problem", "read-only"),
        ("/super", "problem", "read-only"),
        ("/bare/ckpt", "problem", "nobarrier: a crash or power cut can lose sealed checkpoints"),
        ("/bare2", "problem", "nobarrier"),
        ("/fast", "problem", "volatile"),
        ("/fast2", "problem", "fsync=volatile"),
        ("/flash", "problem", "fsync_mode=nobarrier"),
        ("/odd", "warning", "not in the list of known types"),
        ("/old", "warning", "check that rename is atomic"),
    ],
)
def test_the_finding_for_each_file_system(proc: Path, path: str, state: str, says: str) -> None:
    found = check_filesystem(path, proc=proc)
    assert found.state == state and says in f"{found.text}: {found.todo}"
    assert bool(found.todo) == (state != "ok")


@pytest.mark.parametrize(
    ("kind", "option", "state", "says", "todo"),
    [
        ("ext4", "nobarrier", "problem", LOSES, "mount -o remount,barrier /"),
        ("ext3", "barrier=0", "problem", LOSES, "mount -o remount,barrier /"),
        ("btrfs", "nobarrier", "problem", LOSES, "mount -o remount,barrier /"),
        ("xfs", "nobarrier", "problem", LOSES, "mount -o remount,barrier /"),
        ("f2fs", "fsync_mode=nobarrier", "problem", LOSES, "fsync_mode=posix"),
        ("jfs", "nointegrity", "problem", LOSES, "remount it with integrity"),
        ("bcachefs", "journal_flush_disabled", "problem", LOSES, "without journal_flush_disabled"),
        ("overlay", "volatile", "problem", LOSES, "without volatile"),
        ("overlay", "fsync=volatile", "problem", LOSES, "without fsync=volatile"),
        ("cifs", "nostrictsync", "problem", LOSES, "without nostrictsync"),
        ("ext4", "data=writeback", "warning", "sealed checkpoints are safe", "data=ordered"),
        ("ext4", "data=ordered", "ok", "local", ""),
        ("ext4", "data=journal", "ok", "local", ""),
        ("nfs4", "soft", "warning", "a save fails where a slow server", "hard instead of soft"),
        ("nfs4", "softerr", "warning", "a save fails where", "hard instead of softerr"),
        ("nfs4", "nocto", "warning", "another node", "without nocto"),
        ("nfs4", "hard", "ok", "shared between nodes", ""),
    ],
)
def test_the_finding_for_each_mount_option(
    tmp_path: Path, kind: str, option: str, state: str, says: str, todo: str
) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(f"1 0 0:1 / / rw - {kind} far rw,{option},x=1\n")
    found = check_filesystem("/x", proc=tmp_path)
    assert found.state == state and says in found.text and todo in (found.todo or "")
    assert (option in found.text) == (state != "ok")


@pytest.mark.parametrize("kind", ["nfs", "gpfs", "beegfs", "ceph", "cifs", "9p", "fuse.juicefs"])
def test_network_file_systems(tmp_path: Path, kind: str) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(f"1 0 0:1 / / rw - {kind} far rw\n")
    assert "shared" in check_filesystem("/x", proc=tmp_path).text


def test_a_local_disk_on_a_cloud_or_with_several_nodes(proc: Path) -> None:
    assert "needs the same disk" in check_filesystem("/home", ["slurm", "aws"], proc=proc).text
    found = check_filesystem("/home", ["slurm"], nodes=2, proc=proc)
    assert (found.state, found.todo) == ("warning", "use a directory that all nodes share")
    assert check_filesystem("/data", ["slurm"], nodes=2, proc=proc).state == "ok"


def test_without_a_mount_table_the_file_system_is_unknown(tmp_path: Path) -> None:
    assert "unknown" in check_filesystem("/", proc=tmp_path).text


def test_this_kernels_own_mount_table_is_parsed() -> None:
    found = mount_of("/proc/self")
    assert found is not None and (found.point, found.kind) == ("/proc", "proc")

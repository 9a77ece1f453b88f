"""A running fleet is upgraded, and goes back: old and new supervisors in turn in one directory.

The old versions are commits of this repository's history, unpacked for the test.
"""

from __future__ import annotations

import io
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.job import SCRIPTS, Job, survivors, used_samples
from tests.waiting import until

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS, STEPS = 2, 120

VERSIONS = {
    "0.1.0": "20b4c4a5fda7",
    "0.1.0 of 2026-11-29, the first with format 2": "ac748d5c5753",
}
FORMAT_1 = "ac748d5c5753~1"


def unpack(commit: str, directory: Path) -> Path:
    """Return a directory with the package of a commit; skip where history was left out."""
    command = ["git", "-C", str(REPOSITORY), "archive", "--format=tar", commit, "elastic_ckpt"]
    made = subprocess.run(command, capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no commit {commit} here: {made.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(made.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory


class Fleet:
    """One job, each run of which is of one version."""

    def __init__(self, root: Path, *, pause: str = "0.03") -> None:
        self.trace, self.calm = root / "trace", root / "calm"
        self.root = root
        arguments = ["--epochs", "2", "--size", "240", "--pause", pause]
        arguments += ["--calm", str(self.calm), "--trace", str(self.trace)]
        self.job = Job(root / "run", *arguments, nproc=RANKS, script=SCRIPTS / "steady.py")
        self.job.options = ["--save-interval", "10", "--notice-source", "none"]

    def start(self, package: Path) -> None:
        self.job.prefix = ["env", "-C", str(self.root), f"PYTHONPATH={package}"]
        self.job.start()

    def steps(self) -> int:
        file = Path(f"{self.trace}.0")
        return len(file.read_text().splitlines()) if file.exists() else 0

    def run_some(self, package: Path) -> None:
        """Train some steps with a version, and preempt it."""
        before = self.steps()
        self.start(package)
        assert self.job.process is not None
        process = self.job.process

        def trained() -> bool:
            assert process.poll() is None, self.job.output()
            return self.steps() >= before + 15

        until(trained, "15 steps", 120)
        tree = self.job.tree()
        process.send_signal(signal.SIGTERM)
        assert self.job.wait(60) == 75, self.job.output()
        assert survivors(tree) == []

    def finish(self, package: Path) -> dict[tuple[int, int], list]:
        self.calm.touch()
        self.start(package)
        assert self.job.wait(120) == 0, self.job.output()
        used = used_samples(self.trace, RANKS)
        return {key: rest[:-1] for key, rest in used.items()}  # without the incarnation


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], list]:
    fleet = Fleet(tmp_path_factory.mktemp("undisturbed"))
    with fleet.job:
        found = fleet.finish(REPOSITORY)
    assert len(found) == STEPS * RANKS
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_old_new_old_and_new_continue_each_other_to_the_bit(
    version: str, undisturbed: dict[tuple[int, int], list], tmp_path: Path
) -> None:
    old = unpack(VERSIONS[version], tmp_path / "old")
    fleet = Fleet(tmp_path)
    with fleet.job:
        for package in (old, REPOSITORY, old):
            fleet.run_some(package)
        assert fleet.finish(REPOSITORY) == undisturbed
    shown = fleet.job.log.read_text()
    assert shown.count("from step") >= 3 and "Traceback" not in shown


@pytest.mark.slow
def test_job_of_format_1_is_continued(
    undisturbed: dict[tuple[int, int], list], tmp_path: Path
) -> None:
    """What its order was, it stays; and the way back is refused, not misread."""
    old = unpack(FORMAT_1, tmp_path / "old")
    fleet = Fleet(tmp_path)
    with fleet.job:
        fleet.run_some(old)
        fleet.run_some(REPOSITORY)
        fleet.start(old)
        assert fleet.job.wait(120) == 65, fleet.job.output()
        assert "newer" in fleet.job.output()
        assert fleet.finish(REPOSITORY) == undisturbed


@pytest.mark.slow
def test_checkpoints_of_this_version_are_intact_to_the_old_one(tmp_path: Path) -> None:
    """By the old version's own commands."""
    old = unpack(VERSIONS["0.1.0"], tmp_path / "old")
    fleet = Fleet(tmp_path)
    with fleet.job:
        fleet.run_some(REPOSITORY)
        for words in (["verify", "--full"], ["list"]):
            done = subprocess.run(
                [*program_of(tmp_path, old), *words, str(fleet.job.directory)],
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, (words, done.stdout, done.stderr)


def program_of(where: Path, package: Path) -> list[str]:
    """The start of a command of another version."""
    return ["env", "-C", str(where), f"PYTHONPATH={package}", sys.executable, "-m", "elastic_ckpt"]

"""Hugging Face's Trainer with ElasticCallback: saves, stops, and resumes to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.test_imports import modules_after
from tests.job import SCRIPTS, Job, environment
from tests.waiting import until

pytest.importorskip("transformers", minversion="5.0")

SCRIPT = SCRIPTS / "hf_trainer.py"
SECONDS = 150.0


def arguments(out: Path, **options: Any) -> list[str]:
    return [str(out), *(f"{key}={json.dumps(value)}" for key, value in options.items())]


def plain(*arguments: str, nproc: int = 1, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script without a supervisor, as torchrun does."""
    launcher = [
        "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}",
    ] if nproc > 1 else []  # fmt: skip
    return subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *arguments],
        env=environment() | variables, capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip


def digests(out: Path, nproc: int) -> list[str]:
    return [(out / f"digest.{rank}").read_text() for rank in range(nproc)]


def last_step(out: Path, rank: int = 0) -> int:
    path = out / f"trace.{rank}"
    steps = path.read_text().split() if path.exists() else []
    return int(steps[-1]) if steps else 0


def sealed(job: Job) -> list[str]:
    """Return the names of the checkpoints that ``list`` shows as verified."""
    shown = subprocess.run(
        [sys.executable, "-m", "elastic_ckpt", "list", "--json", str(job.directory)],
        env=environment(), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return shown.stdout


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_notice_and_a_crash_change_no_bit(nproc: int, tmp_path: Path) -> None:
    """Dropout, accumulation with a remainder, a schedule; 24 steps in 3 or 6 epochs."""
    undisturbed = plain(
        *arguments(tmp_path / "plain", callbacks=0, num_train_epochs=3 * nproc), nproc=nproc
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    out = tmp_path / "out"
    options = arguments(out, slow=0.1, num_train_epochs=3 * nproc, save_steps=5)
    with Job(tmp_path / "run", *options, nproc=nproc, script=SCRIPT) as job:
        job.start()
        until(lambda: last_step(out) >= 6, seconds=SECONDS)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(SECONDS) == 75, job.output()
        stopped = last_step(out)
        assert stopped % 5, "the save at the notice is one of the Trainer's own"
        assert (out / f"checkpoint-{stopped}/trainer_state.json").exists()
        assert [last_step(out, rank) for rank in range(nproc)] == [stopped] * nproc
        job.start()
        until(lambda: last_step(out) >= stopped + 7, seconds=SECONDS)
        job.workers()[-1].send_signal(signal.SIGKILL)
        assert job.wait(SECONDS) == 0, job.output()
    assert digests(out, nproc) == digests(tmp_path / "plain", nproc)


def test_importing_it_adds_nothing() -> None:
    theirs = modules_after("import transformers.trainer_callback")
    ours = modules_after("import elastic_ckpt.integrations.transformers")
    assert {name for name in ours - theirs if not name.startswith("elastic_ckpt")} == set()

"""Hugging Face's Trainer with ElasticCallback: saves, stops, and resumes to the bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_ckpt.errors import UsageError
from tests.integrations.test_imports import modules_after
from tests.job import SCRIPTS, Job, environment
from tests.waiting import until

pytest.importorskip("transformers", minversion="5.0")

ROOT = Path(__file__).parents[2]
MARKER = "trainer_state.json"
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


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
"""Traced and functionalized as with inductor, but not lowered to code, which takes a minute."""


@pytest.mark.parametrize(
    ("nproc", "more"),
    [
        pytest.param(1, {}, marks=pytest.mark.slow),
        pytest.param(2, {}, marks=pytest.mark.slow),
        (2, COMPILED),
    ],
)
def test_a_notice_and_a_crash_change_no_bit(nproc: int, more: dict, tmp_path: Path) -> None:
    """Dropout, accumulation with a remainder, a schedule; 24 steps in 3 or 6 epochs."""
    more = more | {"num_train_epochs": 3 * nproc}
    undisturbed = plain(*arguments(tmp_path / "plain", callbacks=0, **more), nproc=nproc)
    assert undisturbed.returncode == 0, undisturbed.stderr
    out = tmp_path / "out"
    options = arguments(out, slow=0.1, save_steps=5, **more)
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


def test_trl_resumes_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    script, out = SCRIPTS / "trl_sft.py", tmp_path / "out"
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "plain"), "0", "0"],
        env=environment(), capture_output=True, timeout=SECONDS, check=True,
    )  # fmt: skip
    with Job(tmp_path / "run", str(out), "1", "0.2", nproc=1, script=script) as job:
        job.start()
        until(lambda: last_step(out) >= 6, seconds=SECONDS)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(SECONDS) == 75, job.output()
        assert 6 <= last_step(out) < 18
        assert job.start().wait(SECONDS) == 0, job.output()
    assert digests(out, 1) == digests(tmp_path / "plain", 1)


def test_without_a_supervisor_and_without_saves_of_its_own(tmp_path: Path) -> None:
    """``save_strategy="no"`` leaves the saves at notices; the seals lie in the output_dir."""
    undisturbed = plain(*arguments(tmp_path / "plain", callbacks=0))
    assert undisturbed.returncode == 0, undisturbed.stderr
    out = tmp_path / "out"
    options = arguments(out, save_strategy="no", slow=0.1)
    command = [sys.executable, str(SCRIPT), *options]
    with open(tmp_path / "log", "w") as log:
        first = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
        try:
            until(lambda: last_step(out) >= 5, seconds=SECONDS)
            first.send_signal(signal.SIGTERM)
            assert first.wait(SECONDS) == 75, (tmp_path / "log").read_text()
        finally:
            first.kill()
    stopped = last_step(out)
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{stopped}"]
    fresh = plain(*options, "resumes=false")
    assert "would start at step 0 although" in fresh.stderr
    second = plain(*options)
    assert second.returncode == 0, second.stderr
    assert digests(out, 1) == digests(tmp_path / "plain", 1)


def unmodified(directory: Path) -> Path:
    """Return the example as a script that knows nothing of elastic-ckpt."""
    lines = (ROOT / "examples" / "hf_lm.py").read_text().splitlines()
    kept = [line for line in lines if not line.endswith(("# 1", "# 2", "# 3"))]
    call = "trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)"
    kept.insert(kept.index(next(line for line in kept if "save_model" in line)), f"    {call}")
    script = directory / "lm.py"
    script.write_text("\n".join(kept))
    assert len(lines) - len(kept) == 2
    assert "lastic" not in script.read_text().partition('"""\n\n')[2]
    return script


def test_an_unmodified_script(tmp_path: Path) -> None:
    """The Trainer's own save at a notice; a torn newest checkpoint is set aside."""
    out = tmp_path / "out"
    options = ["--output_dir", str(out), "--save_steps", "5", "--use_cpu", "True",
               "--report_to", "none", "--max_steps", "3000", "--enable_jit_checkpoint", "True",
               "--save_total_limit", "3", "--disable_tqdm", "True"]  # fmt: skip
    with Job(tmp_path / "run", *options, nproc=1, script=unmodified(tmp_path)) as job:
        job.options = ["--watch", str(out / "checkpoint-*"), "--complete-when", MARKER,
                       "--resume-args", "--resume_from_checkpoint {newest}"]  # fmt: skip
        job.start()
        until(lambda: list(out.glob(f"checkpoint-*/{MARKER}")), seconds=SECONDS)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(SECONDS) == 75, job.output()
        newest = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        torn = out / "checkpoint-99999"
        torn.mkdir()
        (torn / "model.safetensors").write_bytes(b"half of it")
        job.arguments[9] = str(int(newest.name.split("-")[1]) + 6)
        assert job.start().wait(SECONDS) == 0, job.output()
        assert "checkpoint-99999 aside" in job.output()
        assert not torn.exists() and (out / "final").exists()


def test_the_example(tmp_path: Path) -> None:
    options = ["--output_dir", str(tmp_path / "out"), "--max_steps", "4", "--use_cpu", "True",
               "--report_to", "none", "--save_steps", "2", "--save_total_limit", "1"]  # fmt: skip
    with Job(tmp_path / "run", *options, nproc=1, script=ROOT / "examples" / "hf_lm.py") as job:
        assert job.start().wait(SECONDS) == 0, job.output()
        seals = json.loads(listed(job.directory))
        assert "checkpoint-4" in str(seals) and "checkpoint-2'" not in str(seals)


def listed(directory: Path) -> str:
    command = [sys.executable, "-m", "elastic_ckpt", "list", "--json", str(directory)]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_jit_checkpoint": True}, "remove enable_jit_checkpoint"),
        ({"save_only_model": True}, "remove save_only_model"),
    ],
)
def test_arguments_that_it_refuses(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments

    from elastic_ckpt.integrations.transformers import ElasticCallback

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UsageError, match=message):
            Trainer(
                torch.nn.Linear(1, 1),
                TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **options),
                callbacks=[ElasticCallback()],
            )
    finally:
        signal.signal(signal.SIGTERM, handler)
    with pytest.raises(UsageError, match="before a Trainer has the callback"):
        ElasticCallback.newest()


def test_two_callbacks_are_refused(tmp_path: Path) -> None:
    done = plain(*arguments(tmp_path, callbacks=2))
    assert "the Trainer has two ElasticCallbacks: pass one" in done.stderr


def test_old_transformers_are_refused() -> None:
    code = (
        "import transformers; transformers.__version__ = '4.30.2'\n"
        "import elastic_ckpt.integrations.transformers"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert "transformers 4.30.2 is too old for ElasticCallback" in done.stderr


def test_importing_it_adds_nothing() -> None:
    theirs = modules_after("import transformers.trainer_callback")
    ours = modules_after("import elastic_ckpt.integrations.transformers")
    assert {name for name in ours - theirs if not name.startswith("elastic_ckpt")} == set()

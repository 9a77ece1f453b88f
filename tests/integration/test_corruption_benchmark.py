"""The benchmark of damaged checkpoints, run small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OURS = "elastic-ckpt"
QUICK_PEERS = ["DCP", "safetensors", "torch.save"]


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=BENCHMARKS.parent,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def report():
    done = python(
        "benchmarks/corruption.py", "--faults", "60", "--clean", "12", "--commands", "3",
        "--peer-faults", "3", "--skip", "ColossalAI", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_every_fault_is_found_without_false_alarms(report):
    assert report["missed"] == []
    assert report["false_alarms"] == []
    assert report["clean"] == 12
    ours = report["outcomes"][OURS]
    assert sum(cell["noticed"] for cell in ours.values()) == 60
    assert len(ours) == 14  # each kind was tried
    assert report["commands"] >= 3


def test_table_has_a_row_per_kind_and_a_column_per_format(report):
    head, *kinds, total = report["table"]
    assert head == ["fault", OURS, *QUICK_PEERS]
    assert [row[0] for row in kinds] == list(report["outcomes"][OURS])
    assert total[:2] == ["all", "100 % (0 %) of 60"]
    assert all(len(row) == len(head) for row in [*kinds, total])


def test_peers_have_separate_results(report):
    """What must hold of each format, or the damage does not reach it or is not compared."""
    for peer in QUICK_PEERS:
        outcomes = report["outcomes"][peer]
        assert outcomes["missing file"] == {"noticed": 3}
        assert outcomes["running state, same length"] == {"silent": 3}
        assert outcomes["file replaced by a link"] == {"harmless": 3}
    assert report["outcomes"]["safetensors"]["torn manifest"] == {"n/a": 3}
    assert report["outcomes"]["DCP"]["torn manifest"] == {"noticed": 3}


SCRIPT = """
import os, runpy, signal, sys, time
sys.path.insert(0, "benchmarks")
import corruption_peers as peers
import elastic_ckpt.checkpoint.verify as verify

def crash():
    yield 1
    os.kill(os.getpid(), signal.SIGSEGV)

def hang():
    yield 1
    time.sleep(60)

def greedy():
    yield 1
    bytearray(2 * peers.MEMORY_HEADROOM)

for work in (crash, greedy, hang):
    peers.LOAD_SECONDS = 0.3 if work is hang else 20.0
    try:
        print(list(peers.forked(work)))
    except (peers.Died, RuntimeError) as error:
        print(type(error).__name__, str(error).strip().splitlines()[-1])

verify.verify_full = verify.read_manifest
sys.argv = "corruption.py --faults 14 --clean 0 --no-peers --commands 0 --markdown".split()
runpy.run_path("benchmarks/corruption.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def broken():
    """Children that end badly, then a benchmark of a verification that looks at the seal only."""
    return python("-c", SCRIPT)


def test_dead_hung_and_raising_children_are_distinguished(broken):
    assert broken.stdout.splitlines()[:3] == [
        "Died SIGSEGV",
        "RuntimeError MemoryError",
        "Died silent for 0 s",
    ]


def test_missed_fault_fails_the_benchmark_and_can_be_replayed(broken):
    assert broken.returncode == 1, broken.stderr
    assert "| truncated file | 0 % (100 %) |" in broken.stdout
    assert "MISSED #2 truncated file" in broken.stdout
    assert "--seed 0 --only 2" in broken.stdout

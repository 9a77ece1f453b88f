"""Disturb a small job many times, in rounds: `make chaos N=1000 SEED=1`.

Each round runs tests/faults/test_bit_exact.py: it starts a job, disturbs it at random moments
drawn from the seed, and compares samples and bits with an undisturbed one. Rounds that passed are
recorded in chaos-rounds.jsonl and not repeated, so an interrupted call resumes where it stopped.
Prints how to replay a failed round, and exits with 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TALLY = ROOT / "chaos-rounds.jsonl"
ROUND = 50
"""Disturbances per job; more only make the comparison slower."""


def main() -> int:
    """Run the missing rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="total number of disturbances")
    parser.add_argument("seed", type=int, help="seed of the first round; later rounds count up")
    args = parser.parse_args()
    passed = read_tally()
    done = 0
    for number, start in enumerate(range(0, args.count, ROUND)):
        seed, count = args.seed + number, min(ROUND, args.count - start)
        if (seed, count) not in passed and not run_round(seed, count):
            print(f"failed; to replay: make chaos N={count} SEED={seed}")
            return 1
        done += count
        print(f"{done} of {args.count} disturbances passed, up to seed {seed}", flush=True)
    return 0


def read_tally() -> set[tuple[int, int]]:
    """Return seed and count of the rounds that passed in any call."""
    lines = TALLY.read_text().splitlines() if TALLY.exists() else []
    return {(line["seed"], line["count"]) for line in map(json.loads, lines)}


def run_round(seed: int, count: int) -> bool:
    """Run one round; return whether it passed."""
    settings = {"ELASTIC_CKPT_TEST_SEED": str(seed), "ELASTIC_CKPT_TEST_DISTURBANCES": str(count)}
    began = time.monotonic()
    test = ["-s", "tests/faults/test_bit_exact.py", "-k", "disturbances"]
    command = [sys.executable, "-m", "pytest", *test]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings})
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the test got the signal too, and has to clean up
        process.wait(60)
        raise
    if code != 0:
        return False
    line = {"seed": seed, "count": count, "seconds": round(time.monotonic() - began)}
    with TALLY.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return True


if __name__ == "__main__":
    sys.exit(main())

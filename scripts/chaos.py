"""Disturb a small job very many times, in rounds that are counted: `make chaos N=1000 SEED=1`.

Each round is a test of its own (tests/faults/test_bit_exact.py): it starts a job, disturbs it at
random moments that its seed decides, and compares samples and bits with an undisturbed one. Rounds
that passed stand in chaos-rounds.jsonl and are not run again, so that a call that was ended goes on
where it was. Prints how to replay a round that did not pass, and ends with 1.
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
"""Disturbances of one job; a job that outlives more of them only takes longer to compare."""


def main() -> int:
    """Run the rounds that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="disturbances in all")
    parser.add_argument("seed", type=int, help="of the first round; each further one has the next")
    args = parser.parse_args()
    passed = read_tally()
    done = 0
    for number, start in enumerate(range(0, args.count, ROUND)):
        seed, count = args.seed + number, min(ROUND, args.count - start)
        if (seed, count) not in passed and not run_round(seed, count):
            print(f"not passed; to replay: make chaos N={count} SEED={seed}")
            return 1
        done += count
        print(f"{done} of {args.count} disturbances without a trace, up to seed {seed}", flush=True)
    return 0


def read_tally() -> set[tuple[int, int]]:
    """Seed and count of the rounds that passed, in whatever call."""
    lines = TALLY.read_text().splitlines() if TALLY.exists() else []
    return {(line["seed"], line["count"]) for line in map(json.loads, lines)}


def run_round(seed: int, count: int) -> bool:
    """Run one; whether it passed."""
    settings = {"ELASTIC_CKPT_TEST_SEED": str(seed), "ELASTIC_CKPT_TEST_DISTURBANCES": str(count)}
    began = time.monotonic()
    test = ["-s", "tests/faults/test_bit_exact.py", "-k", "disturbances"]
    command = [sys.executable, "-m", "pytest", *test]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **settings})
    try:
        code = process.wait()
    except KeyboardInterrupt:  # it has heard of it, too, and has a mount and processes to remove
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

"""Disturb a small job many times, in rounds: `make chaos N=1000 SEED=1`.

Each round runs tests/faults/test_bit_exact.py: it starts a job, disturbs it at random moments
drawn from the seed, and compares samples and bits with an undisturbed one. `make chaos-hosts` does
so with a job on several hosts, in tests/system/test_chaos_on_hosts.py. Rounds that passed are
recorded in chaos-rounds.jsonl and not repeated, so an interrupted call resumes where it stopped.
A round that failed is run again by the next call; its files are kept. Prints how often each kind
came and how to replay what failed, and exits with 1 if anything did.
ELASTIC_CKPT_TEST_KINDS=rewind,host_renamed draws those kinds alone, and records nothing.

As root on Linux a round has mounts of its own, which end with it, however it ends. The undisturbed
run is made once in each call, because all rounds of one length have the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONLY = os.environ.get("ELASTIC_CKPT_TEST_KINDS", "")

_OWN_MOUNTS = ["unshare", "--mount", "--propagation", "private"]
_LINE = re.compile(r"[0-9]+ of [0-9]+, step [0-9]+: (\w+)\n")


@dataclass(frozen=True)
class Job:
    """A kind of job that is disturbed.

    Attributes:
        target: of make.
        test: the file and the name of its test.
        size: disturbances per job; more only make the comparison slower.
        tally: where the rounds that passed are recorded.
    """

    target: str
    test: tuple[str, str]
    size: int
    tally: Path


ONE_HOST = Job(
    "chaos", ("tests/faults/test_bit_exact.py", "disturbances"), 50, ROOT / "chaos-rounds.jsonl"
)
HOSTS = Job(
    "chaos-hosts", ("tests/system/test_chaos_on_hosts.py", "disturbed"), 25,
    ROOT / "chaos-hosts-rounds.jsonl",
)  # fmt: skip


def main() -> int:
    """Run the missing rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int, help="total number of disturbances")
    parser.add_argument("seed", type=int, help="seed of the first round; later rounds count up")
    parser.add_argument("--hosts", action="store_true", help="a job on several hosts; needs root")
    args = parser.parse_args()
    job = HOSTS if args.hosts else ONE_HOST
    passed = {} if ONLY else read_tally(job.tally)
    done, kinds, failed = 0, Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        for number, start in enumerate(range(0, args.count, job.size)):
            seed, count = args.seed + number, min(job.size, args.count - start)
            found = passed.get((seed, count)) or run_round(job, seed, count, Path(place))
            if found is None:
                failed.append(f"failed; to replay: make {job.target} N={count} SEED={seed}")
                print(failed[-1], flush=True)
                continue
            done += count
            kinds.update(found)
            print(f"{done} of {args.count} disturbances passed, up to seed {seed}", flush=True)
    for kind, times in sorted(kinds.items()):
        print(f"{times:6} {kind}")
    print(*failed, sep="\n")
    return 1 if failed else 0


def read_tally(tally: Path) -> dict[tuple[int, int], dict[str, int]]:
    """Return how often each kind came in the rounds that passed in any call, by seed and count."""
    lines = tally.read_text().splitlines() if tally.exists() else []
    found = map(json.loads, lines)
    return {(line["seed"], line["count"]): line.get("kinds", {"": 0}) for line in found}


def run_round(job: Job, seed: int, count: int, place: Path) -> dict[str, int] | None:
    """Run one round; return how often each kind came, or None if it failed."""
    settings = {
        "ELASTIC_CKPT_TEST_SEED": str(seed),
        "ELASTIC_CKPT_TEST_DISTURBANCES": str(count),
        "ELASTIC_CKPT_TEST_CALM": str(place / "calm"),
        # Compiled once: most of a round is the start of Python processes.
        "PYTHONPYCACHEPREFIX": os.environ.get("PYTHONPYCACHEPREFIX", str(place / "compiled")),
    }
    environment = {**os.environ, **settings}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    began = time.monotonic()
    path, name = job.test
    test = ["-s", f"--basetemp={place / 'test'}", path, "-k", name]
    command = [*own_mounts(), sys.executable, "-m", "pytest", *test]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, errors="replace"
    )
    assert process.stdout is not None
    kinds = Counter[str]()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := _LINE.fullmatch(line):
                kinds[match[1]] += 1
        code = process.wait()
    except KeyboardInterrupt:  # the test got the signal too, and has to clean up
        process.wait(60)
        raise
    if code != 0:
        kept = tempfile.mkdtemp(prefix=f"chaos-{seed}-")
        print(f"its files are in {shutil.move(place / 'test', kept)}", flush=True)
        return None
    seconds = round(time.monotonic() - began)
    if ONLY:
        return kinds
    line = {"seed": seed, "count": count, "seconds": seconds, "kinds": dict(kinds)}
    with job.tally.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return kinds


def own_mounts() -> list[str]:
    """Return what to put before a command so that its mounts end with it; empty if not possible."""
    if os.geteuid() != 0:
        return []
    try:
        tried = subprocess.run([*_OWN_MOUNTS, "true"], capture_output=True)
    except FileNotFoundError:
        return []
    return _OWN_MOUNTS if tried.returncode == 0 else []


if __name__ == "__main__":
    sys.exit(main())

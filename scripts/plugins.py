"""Try every plugin of ColossalAI's, and put what came of it into the documentation.

    python scripts/plugins.py try RESULTS.json [NAME ...]
    python scripts/plugins.py write docs/colossalai.md RESULTS.json ...

``try`` trains, saves, and goes on in new processes: with elastic-ckpt, with ColossalAI's own
calls, and on other layouts. On GPUs it takes the setups for which there are enough of them; one
whose ranks differ in their data alone is tried on one GPU otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import plugins
from tests.gpu import devices
from tests.gpu.devices import failure
from tests.integration.ranks import run_ranks
from tests.plugins import SETUPS, Setup

BEGIN = "<!-- plugins: begin -->"
END = "<!-- plugins: end -->"


def main() -> int:
    """Try, or write; 1 if something is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    trial = commands.add_parser("try")
    trial.add_argument("results", type=Path)
    trial.add_argument("names", nargs="*")
    writing = commands.add_parser("write")
    writing.add_argument("document", type=Path)
    writing.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "try":
        return try_all(args.results, args.names)
    write(args.document, [json.loads(path.read_text()) for path in args.results])
    return 0


def try_all(path: Path, names: list[str]) -> int:
    """Try the setups whose names hold one of ``names``; 1 if one is not exact with elastic-ckpt."""
    rows = []
    for setup in SETUPS:
        if names and not any(name in setup.name for name in names):
            continue
        row = try_one(setup)
        rows.append(row)
        others = ", ".join(f"{other['layout']} {other['found']}" for other in row["others"])
        print(f"{setup.name}: {row['ours']}; ColossalAI alone {row['alone']}; {others}", flush=True)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return int(any(row["ours"].startswith("not:") for row in rows))


def machine() -> dict[str, str]:
    """What it ran on."""
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, shim"
    found = {name: version(name) for name in ("torch", "colossalai", "transformers", "peft")}
    return {"where": where, "python": platform.python_version(), **found}


def run(function: Callable[..., Any], setup: Setup, job: str) -> list[Any]:
    """What each rank returned, on GPUs if there are any."""
    if devices.gpus():
        return devices.run(function, setup, job)
    return run_ranks(function, setup.ranks, setup, job)


def lacks(setup: Setup) -> str:
    """Why it cannot be tried here; empty if it can."""
    available = devices.gpus()
    if available and setup.ranks > available:
        return f"it needs {setup.ranks} GPUs"
    return plugins.why_not_here(setup)


def try_one(setup: Setup) -> dict[str, Any]:
    """A row of the table."""
    setup = devices.fitting(setup, devices.gpus()) or setup
    row: dict[str, Any] = {"name": setup.name, "ranks": setup.ranks, "others": []}
    lacking = lacks(setup)
    if lacking:
        return {**row, "ours": "not run", "alone": "not run", "why": lacking}
    with tempfile.TemporaryDirectory() as place:
        job = f"{place}/job"
        undisturbed = run(plugins.train_and_save, setup, job)
        error = failure(undisturbed)
        if error:
            return {**row, "ours": "not run", "alone": "not run", "why": error}
        for key, function in (
            ("ours", plugins.load_and_train),
            ("alone", plugins.load_plainly_and_train),
        ):
            row[key] = verdict(undisturbed, run(function, setup, job))
        for ranks, options in setup.others:
            other = setup.at(ranks, options)
            if not lacks(other):
                row["others"].append(try_other(other, Path(job)))
    return row


def try_other(setup: Setup, job: Path) -> dict[str, str]:
    """Whether another layout can load it, and what it then has."""
    first, again = (job / f"epoch-{epoch}_step-{plugins.STEPS}" for epoch in (0, 1))
    found = failure(run(plugins.load_and_save_again, setup, str(job)))
    if not found:
        differing = plugins.differences(first, again)
        found = "exact" if not differing else f"other {', '.join(differing)}"
        shutil.rmtree(again)
    return {"layout": layout(setup), "found": found}


def layout(setup: Setup) -> str:
    """``4 ranks``, with the sizes that are not 1."""
    sizes = [
        f"{key.removesuffix('_size')}{value}"
        for key, value in setup.options.items()
        if key.endswith("_size") and value > 1 and key != "hidden_size"
    ]
    return " ".join([f"{setup.ranks} rank{'s' * (setup.ranks > 1)}", *sizes])


def verdict(undisturbed: list[Any], resumed: list[Any]) -> str:
    """What is not equal, of the state behind the load and at the end."""
    error = failure(resumed)
    if error:
        return f"not: {error}"
    differing = {
        key
        for mine, theirs in zip(undisturbed, resumed, strict=True)
        for key in mine[0]
        if mine[0][key] != theirs[0][key]
    }
    if differing:
        return f"not: other {', '.join(sorted(differing))}"
    return "exact" if undisturbed == resumed else "not: other steps"


# -- the table --------------------------------------------------------------------------------


def write(document: Path, runs: list[dict[str, Any]]) -> None:
    """Replace what stands between the markers."""
    text = document.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n{table(runs)}\n\n{END}{after}")


def table(runs: list[dict[str, Any]]) -> str:
    """One row per setup; a cell says each run's outcome where they differ."""
    said = [describe(run["machine"]) for run in runs]
    lines = [
        *(f"{number}. {text}" for number, text in enumerate(said, 1)),
        "",
        "| setup | ranks | resume | ColossalAI alone | on another layout |",
        "|---|---|---|---|---|",
    ]
    for rows in zip(*(run["rows"] for run in runs), strict=True):
        cells = [
            rows[0]["name"],
            merge([str(row["ranks"]) for row in rows]),
            merge([cell(row, "ours") for row in rows]),
            merge([cell(row, "alone") for row in rows]),
            merge([others(row) for row in rows]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(machine: dict[str, str]) -> str:
    """One line on what it ran on."""
    where = machine["where"].replace("CPU, shim", "a CPU, through the shim")
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k != "where")
    return f"On {where}: {versions}."


def cell(row: dict[str, Any], key: str) -> str:
    """An outcome in the words of the table."""
    if row[key] == "not run":
        return f"not run: {row['why']}"
    return row[key].replace("not: ", "")


def others(row: dict[str, Any]) -> str:
    """The other layouts, each with what came of it."""
    return "; ".join(f"{other['layout']}: {other['found']}" for other in row["others"]) or "not run"


def merge(cells: list[str]) -> str:
    """One word if all agree, else each run's with its number."""
    if len(set(cells)) == 1:
        return cells[0]
    return "<br>".join(f"({number}) {text}" for number, text in enumerate(cells, 1))


if __name__ == "__main__":
    sys.exit(main())

"""Try every ColossalAI plugin, and write the results into the documentation.

    python scripts/plugins.py try RESULTS.json [NAME ...]
    python scripts/plugins.py write docs/colossalai.md RESULTS.json ...

``try`` trains, saves, and resumes in new processes: with elastic-ckpt, with ColossalAI's own
calls, and on other layouts. With GPUs it uses the setups for which there are enough; one whose
ranks differ only in their data falls back to a single GPU.
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
    """Try, or write; return 1 if a setup failed."""
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
    """Try the setups whose names contain one of ``names``; return 1 if one is not exact."""
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
    """Return the device and the versions."""
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, shim"
    found = {name: version(name) for name in ("torch", "colossalai", "transformers", "peft")}
    return {"where": where, "python": platform.python_version(), **found}


def run(function: Callable[..., Any], setup: Setup, job: str) -> list[Any]:
    """Run a function on all ranks, on GPUs if there are any; return what each returned."""
    if devices.gpus():
        return devices.run(function, setup, job)
    return run_ranks(function, setup.ranks, setup, job)


def lacks(setup: Setup) -> str:
    """Return why a setup cannot be tried here; empty if it can."""
    available = devices.gpus()
    if available and setup.ranks > available:
        return f"it needs {setup.ranks} GPUs"
    return plugins.why_not_here(setup)


def try_one(setup: Setup) -> dict[str, Any]:
    """Return a row of the table."""
    setup = devices.fitting(setup, devices.gpus()) or setup
    row: dict[str, Any] = {"name": setup.name, "ranks": setup.ranks, "others": []}
    lacking = lacks(setup)
    if lacking:
        return {**row, "ours": "not run", "alone": "not run", "why": lacking}
    with tempfile.TemporaryDirectory() as folder:
        job = f"{folder}/job"
        undisturbed = run(plugins.train_and_save, setup, job)
        error = failure(undisturbed)
        if error:
            return {**row, "ours": "not run", "alone": "not run", "why": error}
        for key, function in (
            ("ours", plugins.load_and_train),
            ("alone", plugins.load_plainly_and_train),
        ):
            row[key] = compare(undisturbed, run(function, setup, job))
        for ranks, options in setup.others:
            other = setup.at(ranks, options)
            if not lacks(other):
                row["others"].append(try_other(other, Path(job)))
    return row


def try_other(setup: Setup, job: Path) -> dict[str, str]:
    """Return what another layout loads."""
    first, again = (job / f"epoch-{epoch}_step-{plugins.STEPS}" for epoch in (0, 1))
    found = failure(run(plugins.load_and_save_again, setup, str(job)))
    if not found:
        differing = plugins.differences(first, again)
        found = "exact" if not differing else f"other {', '.join(differing)}"
        shutil.rmtree(again)
    return {"layout": layout(setup), "found": found}


def layout(setup: Setup) -> str:
    """Return, for example, ``4 ranks``, with the sizes other than 1."""
    sizes = [
        f"{key.removesuffix('_size')}{value}"
        for key, value in setup.options.items()
        if key.endswith("_size") and value > 1 and key != "hidden_size"
    ]
    return " ".join([f"{setup.ranks} rank{'s' * (setup.ranks > 1)}", *sizes])


def compare(undisturbed: list[Any], resumed: list[Any]) -> str:
    """Return which parts of the state differ after the load or at the end."""
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
    """Replace the text between the markers."""
    text = document.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n{table(runs)}\n\n{END}{after}")


def table(runs: list[dict[str, Any]]) -> str:
    """Return the table, with one row per setup; a cell lists each run's result if they differ."""
    machines = [describe(run["machine"]) for run in runs]
    lines = [
        *(f"{number}. {text}" for number, text in enumerate(machines, 1)),
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
    """Describe a machine in one line."""
    where = machine["where"].replace("CPU, shim", "a CPU, through the shim")
    versions = ", ".join(f"{k} {v}" for k, v in machine.items() if k != "where")
    return f"On {where}: {versions}."


def cell(row: dict[str, Any], key: str) -> str:
    """Return the text of a cell."""
    if row[key] == "not run":
        return f"not run: {row['why']}"
    return row[key].replace("not: ", "")


def others(row: dict[str, Any]) -> str:
    """Return the results of the other layouts."""
    return "; ".join(f"{other['layout']}: {other['found']}" for other in row["others"]) or "not run"


def merge(cells: list[str]) -> str:
    """Return one text if all agree, otherwise each with its number."""
    if len(set(cells)) == 1:
        return cells[0]
    return "<br>".join(f"({number}) {text}" for number, text in enumerate(cells, 1))


if __name__ == "__main__":
    sys.exit(main())

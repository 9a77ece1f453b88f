"""The page of the market, and its picture, from what run.py wrote.

    python benchmarks/market/page.py bench-results/market.json docs/market.md

What stands between two markers of the page is made here; the picture lies beside the page.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from market.contenders import CONTENDERS
from market.job import BATCH
from market.traces import GENERATORS, HOUR, Change, recorded, several
from market.virtual import Costs, goodput, interval

OURS = next(iter(CONTENDERS))
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
COLOURS = ("#0072b2", "#7d8794", "#b37400", "#a04f85", "#0b6b45", "#cc4b12")
WHOLE = {
    "p3, recorded, without notice": lambda: recorded(),
    "p3, five of them: up to 160 nodes": lambda: several(recorded(), 5),
    "announced: 120 s, 24 nodes": lambda: GENERATORS["announced"](24, 24 * HOUR, 2026),
    "announced: 120 s, 128 nodes": lambda: GENERATORS["announced"](128, 24 * HOUR, 2026),
    "preemptible: 30 s, 128 nodes": lambda: GENERATORS["preemptible"](128, 48 * HOUR, 2026),
    "two zones, no notice, 24 nodes": lambda: GENERATORS["zones"](24, 48 * HOUR, 2026),
}  # fmt: skip


def costs(found: dict[str, Any], name: str) -> Costs | None:
    """A contender's, from all markets that it was in; None if it has no result."""
    runs = [one[name] for one in found["markets"].values() if "goodput" in one.get(name, {})]
    if not runs:
        return None
    gaps: dict[str, list[float]] = {}
    standing, moving, made = 0.0, 0.0, 0
    for run in runs:
        for kind, seconds in run["gaps"].items():
            gaps.setdefault(kind, []).extend(seconds)
        standing += sum(sum(s) for kind, s in run["gaps"].items() if kind != "other")
        moving += run["seconds"]
        made += run["made"]
    step = BATCH / found["samples_per_second"]
    saves = max(1.0, (moving - standing) / found["settings"]["every"])

    def typical(kind: str, other: str) -> float:
        own = gaps.get(kind) or gaps.get(other) or [0.0]
        return statistics.median(own)

    return Costs(
        lost=typical("lost", "came"),
        left=typical("notice", "came"),
        came=typical("came", "lost"),
        stall=max(0.001, (moving - standing - made * step) / saves),
        keeps_on_notice=runs[0]["keeps_on_notice"],
        keeps_on_coming=runs[0]["keeps_on_coming"],
        in_memory=runs[0]["in_memory"],
        keeps_on_loss=CONTENDERS[name].keeps_on_loss,
    )


def tables(found: dict[str, Any]) -> Iterator[str]:
    """What stands between the markers."""
    settings, machine = found["settings"], found["machine"]
    yield (
        f"{settings['hosts']} hosts on a machine of {machine['cores']} cores, torch "
        f"{machine['versions']['torch']}, {settings['megabytes']:.0f} MB of state, steps of "
        f"{settings['step_seconds']:g} s, a save every {settings['every']:g} s, seed "
        f"{settings['seed']}."
    )
    yield ""
    yield "![Samples that count, over time](market.svg)"
    for market, outcomes in found["markets"].items():
        hours, compress = settings["markets"][market]
        played = f"{hours:g} hours in {hours * 60 / compress:.0f} minutes"
        yield from ("", f"### On hosts: {market}, {played}", "")
        yield (
            "| contender | goodput | steps lost | samples repeated, skipped | final state "
            "| recoveries: lost, notice, new node (median; longest) |"
        )
        yield "|---|---|---|---|---|---|"
        for name, one in outcomes.items():
            yield row(name, one)
    yield from ("", "### In real time, whole traces, by arithmetic", "")
    known = {name: found_costs for name in CONTENDERS if (found_costs := costs(found, name))}
    yield "| measured, in seconds | " + " | ".join(known) + " |"
    yield "|---|" + "---|" * len(known)
    for label, of in (
        ("a node is lost, until all train", lambda c: c.lost),
        ("a node leaves with notice", lambda c: c.left),
        ("a node comes", lambda c: c.came),
        ("training stands still for a save", lambda c: c.stall),
    ):
        yield f"| {label} | " + " | ".join(f"{of(c):.2f}" for c in known.values()) + " |"
    yield ""
    yield "| market | node-hours | changes | " + " | ".join(known) + " |"
    yield "|---|---|---|" + "---|" * len(known)
    for label, make in WHOLE.items():
        changes = make()
        cells = [
            f"{goodput(changes, c):.3f} ({interval(changes, c):.0f} s)" for c in known.values()
        ]
        yield (
            f"| {label} | {node_hours(changes):,.0f} | {len({c.at for c in changes})} | "
            f"{' | '.join(cells)} |"
        )


def row(name: str, one: dict[str, Any]) -> str:
    """A contender's line in the table of its market."""
    if "goodput" not in one:
        return f"| {name} | {one['note']} | | | | |"
    verdict = one["verdict"]
    recoveries = ", ".join(
        f"{statistics.median(gaps):.1f} s; {max(gaps):.1f} s" if gaps else "-"
        for gaps in (one["gaps"].get(kind, []) for kind in ("lost", "notice", "came"))
    )
    if not verdict:
        return f"| {name} | {one['goodput']:.3f}: {one['note']} | | | | {recoveries} |"
    state = "**torn**" if verdict["torn"] else "right"
    return (
        f"| {name} | {one['goodput']:.3f} | {one['lost_steps']} of {one['made']} | "
        f"{verdict['repeated']}, {verdict['skipped']} | {state} | {recoveries} |"
    )


def node_hours(changes: list[Change]) -> float:
    """Available in all."""
    nodes, since, total = 0, 0.0, 0.0
    for change in changes:
        total += nodes * (change.at - since)
        since = change.at
        nodes += 1 if change.comes else -1
    return total / HOUR


def picture(found: dict[str, Any]) -> str:
    """A panel for each market: the hosts above, and the samples in each contender's state."""
    width, left, panel = 860, 56, 300
    markets = found["markets"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {panel * len(markets) + 8}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        "<style>text{fill:#30363d}.soft{fill:#535b66}.axis{stroke:#c5ccd5;fill:none}"
        "@media(prefers-color-scheme:dark){text{fill:#eceff3}.soft{fill:#a9b2bd}"
        ".axis{stroke:#4a5361}}</style>",
    ]
    for number, (market, outcomes) in enumerate(markets.items()):
        runs = {name: one for name, one in outcomes.items() if one.get("progress")}
        hours, compress = found["settings"]["markets"][market]
        end = hours * HOUR / compress
        best = found["samples_per_second"] * max(one["available"] for one in runs.values())
        top = panel * number

        def x(at: float, end: float = end) -> float:
            return round(left + (width - left - 230) * min(at, end) / end, 1)

        def y(samples: float, best: float = best, top: int = top) -> float:
            return round(top + 262 - 180 * samples / best, 1)

        parts.append(f'<text x="{left}" y="{top + 18}" font-weight="600">{escape(market)}</text>')
        hosts = next(iter(runs.values()))["presence"]
        path = f"M{x(0)} {top + 70}" + "".join(f"H{x(at)}V{top + 70 - 9 * up}" for at, up in hosts)
        parts.append(
            f'<path d="{path}H{x(end)}V{top + 70}Z" fill="#9fb4c7" fill-opacity="0.5"/>'
            f'<text x="{left - 6}" y="{top + 66}" text-anchor="end" class="soft">hosts</text>'
        )
        for share in (0, 0.5, 1):
            at = y(share * best)
            parts.append(
                f'<path class="axis" d="M{left} {at}H{x(end)}"/><text x="{left - 6}" y="{at + 4}" '
                f'text-anchor="end" class="soft">{share:.0%}</text>'
            )
        parts.append(
            f'<text x="{x(end)}" y="{top + 280}" text-anchor="end" class="soft">'
            f"{hours:g} h of the trace</text>"
        )
        places: list[float] = []
        ranked = sorted(runs.items(), key=lambda item: -item[1]["goodput"])
        for name, one in ranked:
            colour = COLOURS[list(CONTENDERS).index(name)]
            line = "M" + "L".join(f"{x(at)} {y(taken)}" for at, taken in one["progress"])
            place = max(y(one["progress"][-1][1]) + 4, *(p + 15 for p in places), 0)
            places.append(place)
            parts.append(
                f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
                f'<text x="{x(end) + 8}" y="{place}" style="fill:{colour}">{escape(name)} '
                f"{one['goodput']:.2f}</text>"
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write both."""
    source, page = map(Path, sys.argv[1:])
    found = json.loads(source.read_text())
    text = page.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    page.write_text("\n".join([before + BEGIN, "", *tables(found), "", END]) + after)
    page.with_name("market.svg").write_text(picture(found))


if __name__ == "__main__":
    main()

"""The dashboard for Grafana asks for metrics and labels that a supervisor serves."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from elastic_ckpt.supervisor.metrics.table import METRICS, Kind

BOARD = Path(__file__).parents[4] / "scripts" / "prometheus" / "dashboard.json"
THEIRS = {"job", "instance", "job_name", "le"}  # Prometheus's own, and those of every metric


def board() -> Any:
    return json.loads(BOARD.read_text())


def expressions() -> list[tuple[str, str, str]]:
    """Each query, with its panel and its legend."""
    return [
        (panel["title"], one["expr"], one["legendFormat"])
        for panel in board()["panels"]
        for one in panel.get("targets", ())
    ]


def served() -> dict[str, tuple[str, ...]]:
    """Series by name, as a Prometheus has them, with their labels."""
    found = {}
    for metric in METRICS:
        names = [metric.name]
        if metric.kind is Kind.HISTOGRAM:
            names = [f"{metric.name}_{part}" for part in ("bucket", "sum", "count")]
        found.update(dict.fromkeys(names, metric.labels))
    return found


def test_every_query_is_of_a_metric_that_is_served() -> None:
    known = served()
    for title, query, _ in expressions():
        names = re.findall(r"elastic_ckpt_\w+", query)
        assert names and set(names) <= known.keys(), title


def test_every_label_is_one_of_the_metrics_of_its_query() -> None:
    known = served()
    for title, query, legend in expressions():
        names = re.findall(r"elastic_ckpt_\w+", query)
        labels = THEIRS.union(*(known[name] for name in names))
        asked = set(re.findall(r"(\w+)!?=~?\"", query)) | set(re.findall(r"{{(\w+)}}", legend))
        for group in re.findall(r"(?:by|on) \(([^)]*)\)", query):
            asked |= set(group.replace(" ", "").split(","))
        assert asked <= labels, title


def test_what_is_watched_for_is_shown() -> None:
    """Whatever an alert is about is on the board, too."""
    alerts = (BOARD.parent / "alerts.yml").read_text()
    shown = {
        name for _, query, _ in expressions() for name in re.findall(r"elastic_ckpt_\w+", query)
    }
    wanted = {name for name in re.findall(r"elastic_ckpt_\w+", alerts) if name in served()}
    assert wanted - shown <= {"elastic_ckpt_start_time_seconds"}


def test_panels_do_not_overlap_and_have_their_own_ids() -> None:
    panels = board()["panels"]
    assert len({one["id"] for one in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for one in panels:
        at = one["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken and at["x"] + at["w"] <= 24, one["title"]
        taken |= cells

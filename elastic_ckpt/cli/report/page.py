"""The report as one page of HTML: what the template is given, and its rendering."""

from __future__ import annotations

from typing import Any

from elastic_ckpt import __version__
from elastic_ckpt.cli.report.answers import answers
from elastic_ckpt.cli.report.charts import HEIGHT, WIDTH, metric_charts, rate_chart, recoveries
from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.tables import (
    checkpoint_rows,
    failure_rows,
    incarnation_rows,
    incident_rows,
    notice_rows,
    refused_rows,
    save_rows,
    time_rows,
    waits_apart,
)
from elastic_ckpt.cli.report.timeline import timeline
from elastic_ckpt.cli.report.words import ENDINGS, STATES, local_offset, moment, plural, span
from elastic_ckpt.util.text import printable

_TEMPLATE = "report.html.jinja"
_GOOD = ("finished", "running", "starting")
_BAD = ("failed", "dead")


def render(material: Material) -> str:
    """The whole page, in ASCII, which no terminal or mail spoils; every text in it is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("elastic_ckpt", "cli/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["plural"] = plural
    page = environment.get_template(_TEMPLATE).render(values(material))
    return page.encode("ascii", "xmlcharrefreplace").decode()


def values(material: Material) -> dict[str, Any]:
    """By the names that the template has for them."""
    status, history = material.status, material.history
    runs = [run for run in history.runs if run.supervised]
    state = status.state
    return {
        "version": __version__,
        "job": status.job,
        "directory": printable(material.directory),
        "state": STATES.get(state, state),
        "tone": "good" if state in _GOOD else "bad" if state in _BAD else "note",
        "message": "" if status.message == state else status.message,
        "generated": moment(material.at),
        "offset": local_offset(material.at),
        "first": None if history.first is None else moment(material.began),
        "last": moment(material.ended),
        "length": span(material.ended - material.began),
        "supervised": history.is_supervised,
        "runs": len(runs),
        "launches": len(history.incarnations),
        "progress": _progress(material),
        "answers": answers(material),
        "goodput": material.goodput,
        "time": time_rows(material),
        "apart": _apart(material),
        "timeline": timeline(material),
        "charts": metric_charts(material),
        "rate": rate_chart(material),
        "recoveries": recoveries(material),
        "failures": failure_rows(material),
        "failure_count": len(material.failures),
        "notices": notice_rows(material),
        "notice_count": len(history.notices),
        "checkpoints": checkpoint_rows(material),
        "older": material.older,
        "refused": refused_rows(material),
        "saves": save_rows(material),
        "save_count": len(history.saves),
        "incarnations": incarnation_rows(material),
        "incidents": incident_rows(material),
        "incident_count": len(history.incidents),
        "endings": ENDINGS,
        "chart_width": WIDTH,
        "chart_height": HEIGHT,
    }


def _progress(material: Material) -> str:
    """``step 7,200 of 7,500``; empty where nobody knows."""
    found = material.status.progress
    if found is None:
        return ""
    of = f" of {found.total_steps:,}" if found.total_steps else ""
    return f"step {found.step:,}{of}"


def _apart(material: Material) -> str:
    """Time of no interruption, where that is worth a word."""
    found = waits_apart(material)
    return span(found) if found >= 0.05 else ""

"""The report as one page of HTML: the values for the template, and its rendering."""

from __future__ import annotations

from typing import Any, Final

from elastic_ckpt import __version__
from elastic_ckpt.cli.report import tables, words
from elastic_ckpt.cli.report.answers import answers
from elastic_ckpt.cli.report.charts import HEIGHT, WIDTH, metric_charts, rate_chart, recoveries
from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.timeline import timeline
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration

_TEMPLATE: Final = "report.html.jinja"
_GOOD: Final = ("finished", "running", "starting")
_BAD: Final = ("failed", "dead")
_FILTERS: Final = {
    "age": human_duration,
    "bytes": human_bytes,
    "cost": words.cost,
    "cut": words.cut,
    "moment": words.moment,
    "newest": tables.newest,
    "origin": words.origin,
    "plural": words.plural,
    "printable": printable,
    "share": words.share,
    "span": words.span,
    "step": words.step,
}


def render(material: Material) -> str:
    """Return the whole page in ASCII, safe for any terminal or mail, with every text escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("elastic_ckpt", "cli/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)
    page = environment.get_template(_TEMPLATE).render(values(material))
    return page.encode("ascii", "xmlcharrefreplace").decode()


def values(material: Material) -> dict[str, Any]:
    """Return the template's variables."""
    status, history = material.status, material.history
    state = status.state
    return {
        "version": __version__,
        "material": material,
        "status": status,
        "history": history,
        "goodput": material.goodput,
        "state": words.STATES.get(state, state),
        "tone": "good" if state in _GOOD else "bad" if state in _BAD else "note",
        "offset": words.local_offset(material.at),
        "answers": answers(material),
        "time": tables.time_rows(material),
        "unattributed": tables.unattributed_seconds(material),
        "timeline": timeline(material),
        "charts": metric_charts(material),
        "rate": rate_chart(material),
        "recoveries": recoveries(material),
        "failures": tables.failure_rows(material),
        "notices": tables.notice_rows(material),
        "refused": tables.refused_rows(material),
        "saves": tables.save_rows(material),
        "causes": words.CAUSES,
        "classes": words.CLASSES,
        "endings": words.ENDINGS,
        "notice_kinds": words.NOTICES,
        "chart_width": WIDTH,
        "chart_height": HEIGHT,
    }

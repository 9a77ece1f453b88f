"""The report as one page of HTML: the values for the template, and its rendering."""

from __future__ import annotations

from typing import Any, Final

from elastic_ckpt import __version__
from elastic_ckpt.cli.report import tables, words
from elastic_ckpt.cli.report.answers import answers, typed
from elastic_ckpt.cli.report.charts import HEIGHT, WIDTH, metric_charts, rate_chart, recoveries
from elastic_ckpt.cli.report.market import market_rows, shown_rows
from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.origin import origin_of
from elastic_ckpt.cli.report.tiers import tier_rows
from elastic_ckpt.cli.report.timeline import timeline
from elastic_ckpt.supervisor.web.script import EVERY_SECONDS, POLICY, SCRIPT
from elastic_ckpt.util.text import printable
from elastic_ckpt.util.units import human_bytes, human_duration

_STATIC: Final = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""What a page in a file may do: show itself."""

_TEMPLATE: Final = "report.html.jinja"
_FILTERS: Final = {
    "age": human_duration,
    "bytes": human_bytes,
    "cost": words.cost,
    "cut": words.cut,
    "exact": words.exact,
    "moment": words.moment,
    "newest": tables.newest,
    "origin": words.origin,
    "plural": words.plural,
    "printable": printable,
    "share": words.share,
    "span": words.span,
    "step": words.step,
}


def render(material: Material, *, is_live: bool = False) -> str:
    """Return the whole page in ASCII, safe for any terminal or mail, with every text escaped.

    Args:
        is_live: with the one script that keeps it up to date; else it has none.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("elastic_ckpt", "cli/report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(_FILTERS)
    live = {"script": SCRIPT, "policy": POLICY} if is_live else {"script": "", "policy": _STATIC}
    live["every"] = f"{EVERY_SECONDS} seconds"
    page = environment.get_template(_TEMPLATE).render(values(material) | live)
    return page.encode("ascii", "xmlcharrefreplace").decode()


def values(material: Material) -> dict[str, Any]:
    """Return the template's variables."""
    status, history = material.status, material.history
    state, found = status.state, answers(material)
    curves = metric_charts(material)
    rows = timeline(material)
    return {
        "version": __version__,
        "material": material,
        "status": status,
        "history": history,
        "goodput": material.goodput,
        "state": words.STATES.get(state, state),
        "tone": next(one.tone for one in found if one.name == "safe"),
        "offset": words.local_offset(material.at),
        "answers": found,
        "typed": typed(material),
        "time": tables.time_rows(material),
        "unattributed": tables.unattributed_seconds(material),
        "timeline": rows,
        "drawn": rows.drawn if rows else set(),
        "charts": curves,
        "reports_loss": any("loss" in one.title for one in curves),
        "redone": any(kind == "again" for one in curves for kind, _ in one.lines),
        "market": shown_rows(market_rows(material)),
        "tiers": tier_rows(material),
        "origin": origin_of(material.records, history),
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

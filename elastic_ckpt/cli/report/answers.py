"""The five questions at the top of the report, answered in plain sentences with numbers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from humanize import natural_list

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import CAUSES, CLASSES, plural, share, span
from elastic_ckpt.cli.status.view import NewestView
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.cost import Cost
from elastic_ckpt.journal.history_types import Interruption, NoticeKind
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.util.units import human_duration

Tone = Literal["good", "note", "bad"]
Found = tuple[Tone, str, list[str]]
"""Tone, verdict and sentences of an answer."""

_NEGLIGIBLE_SECONDS: Final = 0.05
_QUOTED: Final = 90  # characters of a message
_SHOWN: Final = 5  # classes of failures
_LASTING: Final = {"disk": "On the disk", "bucket": "In the bucket"}
"""The tiers that outlive the machine."""


@dataclass(frozen=True)
class Answer:
    """A question, a verdict in a few words, and sentences that support it."""

    name: str
    question: str
    tone: Tone
    verdict: str
    sentences: list[str]


def answers(material: Material) -> list[Answer]:
    """Return all five answers in order."""
    return [Answer(name, question, *find(material)) for name, question, find in _QUESTIONS]


def _lost(material: Material) -> Found:
    if not material.history.is_supervised:
        return _UNKNOWN
    lost = material.goodput.lost_work_seconds
    count = len(material.history.interruptions)
    killed = sum(run.killed for run in material.history.runs)
    unseen = f"The last 30 s of {plural(killed, 'killed run')} may be missing here."
    if lost < _NEGLIGIBLE_SECONDS:
        where = f" in {plural(count, 'interruption')}" if count else ""
        sentences = [f"No step was repeated{where}.", *([unseen] if killed else [])]
        return ("note", "Nothing known", sentences) if killed else ("good", "Nothing", sentences)
    steps = sum(cost.lost_steps for cost in material.costs if cost.lost_steps is not None)
    whole = material.goodput.wall_seconds
    repeated = f"{plural(steps, 'step')} had to be repeated: " if steps else ""
    sentences = [f"{repeated}{share(lost, whole)} of the {span(whole)} since the first start."]
    worst = max(material.failures, key=lambda one: one[2].lost_seconds, default=None)
    if worst is not None and worst[2].lost_seconds > _NEGLIGIBLE_SECONDS:
        count = worst[2].lost_steps or 0
        most = span(worst[2].lost_seconds) + (f", {plural(count, 'step')}" if count else "")
        sentences.append(f"The most in {worst[0]}: {most}.")
    if material.preemptions:
        seconds = sum(cost.lost_seconds for _, cost in material.preemptions)
        number = plural(len(material.preemptions), "preemption")
        amount = "nothing" if seconds < _NEGLIGIBLE_SECONDS else span(seconds)
        sentences.append(f"{number} lost {amount}.")
    if killed:
        sentences.append(unseen)
    return "note", f"{span(lost)} of training", sentences


def _why(material: Material) -> Found:
    history = material.history
    failures, preempted = len(material.failures), len(material.preemptions)
    others = len(history.interruptions) - failures - preempted
    if not history.is_supervised:
        return _UNKNOWN
    if not history.interruptions:
        return "good", "No interruption", ["Nothing has stopped it."]
    counts = ((failures, "failure"), (preempted, "preemption"), (others, "regrouping"))
    parts = [plural(number, word) for number, word in counts if number]
    classes = _classes(material)
    sentences = [_class_of(failures) for failures in classes[:_SHOWN]]
    more = len(classes) - _SHOWN
    if more > 0:
        sentences.append(f"{plural(more, 'more class', 'more classes')} of failures below.")
    sources = Counter(
        f"{one.source}: {_cut(one.reason)}"
        for one in history.notices
        if one.kind is NoticeKind.NOTICE and not one.follows
    )
    for source, number in sources.most_common(3):
        sentences.append(f"{plural(number, 'notice')} from {source}.")
    return "note", natural_list(parts), sentences


def _classes(material: Material) -> list[list[tuple[str, Interruption, Cost]]]:
    """Return the failures of each class, the most frequent class first."""
    found: dict[str, list[tuple[str, Interruption, Cost]]] = {}
    for failure in material.failures:
        found.setdefault(failure[1].kind or CAUSES[failure[1].cause], []).append(failure)
    return sorted(found.values(), key=len, reverse=True)


def _class_of(failures: Sequence[tuple[str, Interruption, Cost]]) -> str:
    """Return ``Killed by a signal, 2 times, the last F7: killed by SIGKILL.``"""
    label, one, _ = failures[-1]
    kind = _capitalized(CLASSES.get(one.kind, one.kind) or CAUSES[one.cause])
    which = label if len(failures) == 1 else f"{len(failures):,} times, the last {label}"
    message = f": {_cut(one.message)}" if one.message else ""
    return f"{kind}, {which}{message}."


def _safe(material: Material) -> Found:
    status = material.status
    tone, verdict = _safety(material)
    sentences = [
        _on_disk(status.newest_on_disk),
        *(f"{_capitalized(text)}." for text in status.warnings),
    ]
    if status.at_risk is not None:
        risk = status.at_risk
        steps = "" if risk.steps is None else f"{plural(risk.steps, 'step')}, "
        sentences.append(f"If the node died now: {steps}{span(risk.seconds)} to repeat.")
    if status.state in ("failed", "dead") and status.message:
        sentences.append(f"{_capitalized(_cut(status.message, 300))}.")
    if status.advice:
        sentences.append(f"{_capitalized(status.advice)}.")
    return tone, verdict, sentences


def _safety(material: Material) -> tuple[Tone, str]:
    status = material.status
    last = material.history.runs[-1] if material.history.runs else None
    match status.state:
        case "failed" | "dead":
            return "bad", "No: it is not running"
        case "unknown":
            return "note", "No supervisor"
        case _ if status.newest_on_disk is None:
            return "bad", "No: there is no checkpoint"
        case "finished":
            return "good", "Yes: it has finished"
        case "preempted" if last is not None and last.exit_code == ExitCode.PREEMPTED_SAVED:
            return "good", "Yes: saved, and waiting"
        case "preempted":
            return "note", "Waiting, not newly saved"
        case _ if status.warnings:
            return "note", "Not quite"
    return "good", "Yes"


def _good(material: Material) -> Found:
    history = material.history
    sentences = [*_verified(material)]
    refused = len(history.refused)
    if refused:
        last = history.refused[-1]
        name = last.path.rstrip("/").rpartition("/")[2]
        which = "" if refused == 1 else "the last "
        sentences.append(f"{refused} refused and not used: {which}{name}, {_cut(last.reason)}.")
    failed = [one for one in history.saves if one.error]
    if history.saves:
        sealed = len(history.saves) - len(failed)
        errors = f"; {len(failed)} failed, the last: {_cut(failed[-1].error)}" if failed else ""
        sentences.append(f"{sealed:,} of {plural(len(history.saves), 'save')} sealed{errors}.")
    lasting = [one for one in material.checkpoints if one.tier in _LASTING]
    intact = [one.intact for one in lasting]
    if lasting:
        place = _LASTING[lasting[0].tier]
        sentences.append(f"{place}, {sum(intact)} of {len(intact)} are intact.")
    if not sentences:
        sentences.append("No save is in the journal, and no checkpoint on the disk.")
    if material.status.newest_intact is None:
        if intact or refused:
            return "bad", "No: none is intact", sentences
        return "note", "There is none yet", sentences
    verdict = f"Yes; {refused} bad one{'s' * (refused != 1)} refused" if refused else "Yes"
    return "note" if refused or failed else "good", verdict, sentences


def _verified(material: Material) -> Iterator[str]:
    verified = material.history.verified
    passed = verified.total()
    if passed:
        in_full, fetched = verified["every byte"], verified["every byte that is fetched"]
        ways = (
            (in_full, "by every byte"),
            (fetched, "by every byte that was fetched"),
            (passed - in_full - fetched, "by their sizes, in memory"),
        )
        parts = natural_list([f"{number} {way}" for number, way in ways if number])
        yield f"{plural(passed, 'load')}, each verified first: {parts}."
    newest = next((one for one in material.checkpoints if one.intact), None)
    if newest is not None and newest.tier in _LASTING:
        how = "every byte was verified" if newest.verified else "only its sizes were compared"
        yield f"The newest is step {newest.step:,}: {how}."


def _cost(material: Material) -> Found:
    found = material.goodput
    if not material.history.is_supervised:
        return _UNKNOWN
    whole = found.wall_seconds
    saves = plural(len(material.history.saves), "save")
    parts = [
        f"{span(found.seconds(category))} {words}"
        for category, words in (
            (Category.LOST_WORK, "of lost work"),
            (Category.RECOVERY, "of recovery"),
            (Category.WAITING, "of waiting"),
            (Category.STALL, f"of stalls for {saves}"),
            (Category.SETUP, "of set-up"),
        )
        if found.seconds(category) >= 0.001
    ]
    sentences = [f"Of {span(whole)}, {span(found.training_seconds)} were training that counts."]
    if parts:
        sentences.append(f"The rest: {natural_list(parts)}.")
    totals = [one.total for one in material.history.recoveries]
    if totals:
        worst = f", at worst {span(max(totals))}" if len(totals) > 1 else ""
        middle = span(statistics.median(totals))
        sentences.append(f"A failure took {middle} until the next step was done (median){worst}.")
    verdict = f"{share(found.training_seconds, whole)} goodput" if whole > 0 else "Nothing yet"
    fraction = found.fraction or 0.0
    return "good" if fraction >= 0.9 else "note", verdict, sentences


_UNKNOWN: Final[Found] = (
    "note", "Not known",
    ["No supervisor ran, so there is no record of it. Saves and loads are below."],
)  # fmt: skip

_QUESTIONS: Final[Sequence[tuple[str, str, Callable[[Material], Found]]]] = (
    ("lost", "What was lost?", _lost),
    ("why", "Why?", _why),
    ("safe", "Is it safe now?", _safe),
    ("good", "Was the checkpoint good?", _good),
    ("cost", "What did it cost?", _cost),
)


def _on_disk(newest: NewestView | None) -> str:
    if newest is None:
        return "There is no intact checkpoint on the disk: a start would begin at step 0."
    age = "" if newest.age_seconds is None else f", {human_duration(newest.age_seconds)} old"
    place = _LASTING.get(newest.tier, "on the disk").lower()
    return f"The newest {place} is step {newest.step:,} ({newest.reason}{age})."


def _cut(text: str, limit: int = _QUOTED) -> str:
    shown = text if len(text) <= limit else f"{text[:limit].rstrip()}…"
    return shown.rstrip(". ")


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]

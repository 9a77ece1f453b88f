"""The five questions at the top of the report, answered in plain sentences with numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import CAUSES, CLASSES, listed, plural, share, span, tally
from elastic_ckpt.cli.status.view import NewestView
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.cost import Cost
from elastic_ckpt.journal.history_types import Interruption, NoticeKind
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.util.units import human_duration

Tone = Literal["good", "note", "bad"]

_LITTLE = 0.05  # seconds that nobody calls a loss
_QUOTED = 90  # characters of a message
_SHOWN = 5  # classes of failures


@dataclass(frozen=True)
class Answer:
    """One question, the answer in a few words, and the sentences behind it."""

    name: str
    question: str
    tone: Tone
    verdict: str
    sentences: list[str]


def answers(material: Material) -> list[Answer]:
    """All five, in the order in which they are asked."""
    return [_lost(material), _why(material), _safe(material), _good(material), _cost(material)]


def _lost(material: Material) -> Answer:
    question = "What was lost?"
    if not material.history.is_supervised:
        return _unknown("lost", question)
    lost = material.goodput.lost_work_seconds
    count = len(material.history.interruptions)
    killed = sum(run.killed for run in material.history.runs)
    unseen = f"Of {plural(killed, 'killed run')} the last 30 s may be missing here."
    if lost < _LITTLE:
        behind = f" in {plural(count, 'interruption')}" if count else ""
        told = [f"No step was done twice{behind}.", *([unseen] if killed else [])]
        tone: Tone = "note" if killed else "good"
        return Answer("lost", question, tone, "Nothing known" if killed else "Nothing", told)
    steps = [cost.lost_steps for cost in material.costs if cost.lost_steps is not None]
    whole = material.goodput.wall_seconds
    again = f"{plural(sum(steps), 'step')} had to be done again: " if sum(steps) else ""
    sentences = [f"{again}{share(lost, whole)} of the {span(whole)} since the first start."]
    worst = max(material.failures, key=lambda one: one[2].lost_seconds, default=None)
    if worst is not None and worst[2].lost_seconds > _LITTLE:
        most = f"{span(worst[2].lost_seconds)}{_steps(worst[2].lost_steps)}"
        sentences.append(f"The most in {worst[0]}: {most}.")
    if material.preemptions:
        spared = sum(cost.lost_seconds for _, cost in material.preemptions)
        number = plural(len(material.preemptions), "preemption")
        took = "nothing" if spared < _LITTLE else span(spared)
        sentences.append(f"{number} lost {took}.")
    if killed:
        sentences.append(unseen)
    return Answer("lost", question, "note", f"{span(lost)} of training", sentences)


def _why(material: Material) -> Answer:
    question, history = "Why?", material.history
    failures, preempted = len(material.failures), len(material.preemptions)
    others = len(history.interruptions) - failures - preempted
    if not history.is_supervised:
        return _unknown("why", question)
    if not history.interruptions:
        return Answer("why", question, "good", "No interruption", ["Nothing has stopped it."])
    parts = [
        plural(number, *words)
        for number, words in (
            (failures, ("failure",)),
            (preempted, ("preemption",)),
            (others, ("regrouping",)),
        )
        if number
    ]
    sentences = [_class_of(failures) for failures in _classes(material)[:_SHOWN]]
    more = len(_classes(material)) - _SHOWN
    if more > 0:
        sentences.append(f"{plural(more, 'more class', 'more classes')} of failures below.")
    heard = [one for one in history.notices if one.kind is NoticeKind.NOTICE and not one.follows]
    for words, number in tally(f"{one.source}: {_cut(one.reason)}" for one in heard)[:3]:
        sentences.append(f"{plural(number, 'notice')} from {words}.")
    return Answer("why", question, "note", listed(parts), sentences)


def _classes(material: Material) -> list[list[tuple[str, Interruption, Cost]]]:
    """The failures of each class, the most frequent one first."""
    found: dict[str, list[tuple[str, Interruption, Cost]]] = {}
    for failure in material.failures:
        found.setdefault(failure[1].kind or CAUSES[failure[1].cause], []).append(failure)
    return sorted(found.values(), key=len, reverse=True)


def _class_of(failures: Sequence[tuple[str, Interruption, Cost]]) -> str:
    """``Killed by a signal, 2 times, the last F7: killed by SIGKILL.``"""
    label, one, _ = failures[-1]
    kind = _begun(CLASSES.get(one.kind, one.kind) or CAUSES[one.cause])
    which = label if len(failures) == 1 else f"{len(failures):,} times, the last {label}"
    said = f": {_cut(one.message)}" if one.message else ""
    return f"{kind}, {which}{said}."


def _safe(material: Material) -> Answer:
    status = material.status
    tone, verdict = _safety(material)
    sentences = [_held(status.newest_on_disk), *(f"{_begun(text)}." for text in status.warnings)]
    if status.at_risk is not None:
        risk = status.at_risk
        steps = "" if risk.steps is None else f"{plural(risk.steps, 'step')}, "
        sentences.append(f"Should the node die now: {steps}{span(risk.seconds)} to do again.")
    if status.state in ("failed", "dead") and status.message:
        sentences.append(f"{_begun(_cut(status.message, 300))}.")
    if status.advice:
        sentences.append(f"{_begun(status.advice)}.")
    return Answer("safe", "Is it safe now?", tone, verdict, sentences)


def _safety(material: Material) -> tuple[Tone, str]:
    status = material.status
    last = material.history.runs[-1] if material.history.runs else None
    match status.state:
        case "failed" | "dead":
            return "bad", "Nobody runs it"
        case "unknown":
            return "note", "Nobody watches it"
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


def _good(material: Material) -> Answer:
    question, history = "Was the checkpoint good?", material.history
    sentences = [*_verified(material)]
    refused = len(history.refused)
    if refused:
        last = history.refused[-1]
        name = last.path.rstrip("/").rpartition("/")[2]
        which = "" if refused == 1 else "the last "
        sentences.append(f"{refused} refused, and not used: {which}{name}, {_cut(last.reason)}.")
    failed = [one for one in history.saves if one.error]
    if history.saves:
        told = f"; {len(failed)} failed, the last: {_cut(failed[-1].error)}" if failed else ""
        sealed = len(history.saves) - len(failed)
        sentences.append(f"{sealed:,} of {plural(len(history.saves), 'save')} were sealed{told}.")
    looked = [one.intact for one in material.checkpoints if one.tier == "disk"]
    if looked:
        sentences.append(f"On the disk, {sum(looked)} of {len(looked)} are intact.")
    if not sentences:
        sentences.append("No save is in the journal, and no checkpoint on the disk.")
    if material.status.newest_intact is None:
        tone: Tone = "bad" if looked or refused else "note"
        verdict = "No: none is intact" if looked or refused else "There is none yet"
        return Answer("good", question, tone, verdict, sentences)
    verdict = f"Yes; {refused} bad one{'s' * (refused != 1)} refused" if refused else "Yes"
    return Answer("good", question, "note" if refused or failed else "good", verdict, sentences)


def _verified(material: Material) -> Iterator[str]:
    """What was looked at, and how closely."""
    passed = [one for one in material.history.checks if one.intact]
    if passed:
        in_full = sum(one.how == "every byte" for one in passed)
        ways = ((in_full, "by every byte"), (len(passed) - in_full, "by their sizes, in memory"))
        told = listed([f"{number} {way}" for number, way in ways if number])
        yield f"{plural(len(passed), 'load')}, each verified first: {told}."
    newest = next((one for one in material.checkpoints if one.intact), None)
    if newest is not None and newest.tier == "disk":
        ever = "every byte of it was verified" if newest.verified else "its sizes were compared"
        yield f"The newest is step {newest.step:,}: {ever}."


def _cost(material: Material) -> Answer:
    question, found = "What did it cost?", material.goodput
    if not material.history.is_supervised:
        return _unknown("cost", question)
    whole = found.wall_seconds
    saves = plural(len(material.history.saves), "save")
    parts = [
        f"{span(found.seconds(category))} {words}"
        for category, words in (
            (Category.LOST_WORK, "of lost work"),
            (Category.RECOVERY, "of recovery"),
            (Category.WAITING, "of waiting"),
            (Category.STALL, f"of standing still for {saves}"),
            (Category.SETUP, "of set-up"),
        )
        if found.seconds(category) >= 0.001
    ]
    sentences = [f"Of {span(whole)}, {span(found.training_seconds)} were training that counts."]
    if parts:
        sentences.append(f"The rest: {listed(parts)}.")
    totals = [one.total for one in material.history.recoveries]
    if totals:
        worst = f", at worst {span(max(totals))}" if len(totals) > 1 else ""
        middle = span(statistics.median(totals))
        sentences.append(f"A failure took {middle} until the next step was done (median){worst}.")
    verdict = f"{share(found.training_seconds, whole)} goodput" if whole > 0 else "Nothing yet"
    fraction = found.fraction or 0.0
    return Answer("cost", question, "good" if fraction >= 0.9 else "note", verdict, sentences)


def _unknown(name: str, question: str) -> Answer:
    told = "No supervisor ran, and nobody else notes this. Saves and loads are below."
    return Answer(name, question, "note", "Not known", [told])


def _held(disk: NewestView | None) -> str:
    if disk is None:
        return "There is no intact checkpoint on the disk: a start would begin at step 0."
    age = f", {human_duration(disk.age_seconds)} old" if disk.age_seconds is not None else ""
    return f"The newest on the disk is step {disk.step:,} ({disk.reason}{age})."


def _steps(count: int | None) -> str:
    return f", {plural(count, 'step')}" if count else ""


def _cut(text: str, limit: int = _QUOTED) -> str:
    """A message as part of a sentence."""
    shown = text if len(text) <= limit else f"{text[:limit].rstrip()}…"
    return shown.rstrip(". ")


def _begun(text: str) -> str:
    """As the beginning of a sentence."""
    return text[:1].upper() + text[1:]

"""The five questions at the top of the report, answered in plain sentences with numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from humanize import natural_list

from elastic_ckpt.cli.report.material import Material
from elastic_ckpt.cli.report.words import CATEGORIES, CAUSES, CLASSES, plural, share, span
from elastic_ckpt.cli.status.view import NewestView
from elastic_ckpt.errors import ExitCode
from elastic_ckpt.journal.cost import Cost
from elastic_ckpt.journal.history_types import Interruption, NoticeKind
from elastic_ckpt.journal.time_account import Category
from elastic_ckpt.util.units import human_duration

Tone = Literal["", "amber", "red"]
"""Nothing is wrong, time was or is being lost, or data is at risk."""

Found = tuple[Tone, str, list[str]]
"""Tone, verdict and sentences of an answer."""

_NEGLIGIBLE_SECONDS: Final = 0.05
_QUOTED: Final = 90  # characters of a message
_SHOWN: Final = 5  # classes of failures
_LINES: Final = 4  # of a worker's output
_FIRST_SAVE_SECONDS: Final = 600.0  # of training without a save in which nothing is wrong
_TOLERATED: Final = 0.1  # share of the time
_LOST: Final = (Category.LOST_WORK, Category.RECOVERY, Category.WAITING)
_LASTING: Final = {"disk": "On the disk", "bucket": "In the bucket"}
"""The tiers that outlive the machine."""


@dataclass(frozen=True)
class Answer:
    """A question, a verdict in a few words, and sentences that support it. ``printed``: the last
    lines of the worker because of which the job failed."""

    name: str
    question: str
    tone: Tone
    verdict: str
    sentences: list[str]
    printed: list[str] = field(default_factory=list)


def answers(material: Material) -> list[Answer]:
    """Return all five answers in order."""
    return [
        Answer(name, question, *find(material), _printed(material) if find is _why else [])
        for name, question, find in _QUESTIONS
    ]


def _printed(material: Material) -> list[str]:
    last = material.status.last_failure
    if last is None or material.status.state != "failed":
        return []
    return [line for line in last.tail if line.strip(" ^~")][-_LINES:]


def _lost(material: Material) -> Found:
    if not material.history.is_supervised:
        return _UNKNOWN
    killed = sum(run.killed for run in material.history.runs)
    unseen = [f"The last 30 s of {plural(killed, 'killed run')} may be missing here."]
    unseen = unseen if killed else []
    if material.goodput.lost_work_seconds < _NEGLIGIBLE_SECONDS:
        verdict = "Nothing known" if killed else "Nothing"
        return "amber" if killed else "", verdict, ["No step was repeated.", *unseen]
    steps = sum(cost.lost_steps for cost in material.costs if cost.lost_steps is not None)
    verdict = plural(steps, "step") if steps else "Work since the last save"
    sentences = ["Trained again after an interruption." if steps else "It will be trained again."]
    worst = max(material.failures, key=lambda one: one[2].lost_seconds, default=None)
    if worst is not None and len(material.failures) > 1 and worst[2].lost_seconds > 0:
        sentences.append(f"The most in {worst[0]}.")
    if material.preemptions:
        seconds = sum(cost.lost_seconds for _, cost in material.preemptions)
        if seconds < _NEGLIGIBLE_SECONDS:
            sentences.append("No preemption lost anything.")
    return "amber", verdict, sentences + unseen


def _why(material: Material) -> Found:
    history = material.history
    failures, preempted = len(material.failures), len(material.preemptions)
    others = len(history.interruptions) - failures - preempted
    if not history.is_supervised:
        return _UNKNOWN
    if not history.interruptions:
        return "", "No interruption", ["Nothing has stopped it."]
    counts = ((failures, "failure"), (preempted, "preemption"), (others, "regrouping"))
    parts = [plural(number, word) for number, word in counts if number]
    classes = _classes(material)
    sentences = [_class_of(failures) for failures in classes[:_SHOWN]]
    if len(classes) > _SHOWN:
        sentences.append("Further classes of failures are below.")
    sources = Counter(
        f"{one.source}: {_cut(one.reason)}"
        for one in history.notices
        if one.kind is NoticeKind.NOTICE and not one.follows
    )
    for source, number in sources.most_common(3):
        sentences.append(f"{'A notice' if number == 1 else 'Notices'} from {source}.")
    return "amber" if failures else "", natural_list(parts), sentences


def _classes(material: Material) -> list[list[tuple[str, Interruption, Cost]]]:
    """Return the failures of each class, the most frequent class first."""
    found: dict[str, list[tuple[str, Interruption, Cost]]] = {}
    for failure in material.failures:
        found.setdefault(failure[1].kind or CAUSES[failure[1].cause], []).append(failure)
    return sorted(found.values(), key=len, reverse=True)


def _class_of(failures: Sequence[tuple[str, Interruption, Cost]]) -> str:
    """Return ``Killed by a signal, last in F7: killed by SIGKILL.``"""
    label, one, _ = failures[-1]
    kind = _capitalized(CLASSES.get(one.kind, one.kind) or CAUSES[one.cause])
    which = label if len(failures) == 1 else f"last in {label}"
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
    if status.advice:
        typed = f" {status.commands[0]}" if status.advice.endswith(":") and status.commands else ""
        sentences.append(f"{_capitalized(status.advice)}{typed or '.'}")
    return tone, verdict, sentences


def _safety(material: Material) -> tuple[Tone, str]:
    status = material.status
    last = material.history.runs[-1] if material.history.runs else None
    at_risk = bool(status.warnings) and _is_about_data(material)
    match status.state:
        case "failed" | "dead":
            unsafe = status.newest_on_disk is None or bool(status.memory_only)
            return "red" if unsafe else "amber", "No: it is not running"
        case "unknown":
            return "", "No supervisor"
        case _ if status.newest_on_disk is None:
            return _without_checkpoint(material)
        case "finished":
            return "", "Yes: it has finished"
        case "preempted" if last is not None and last.exit_code == ExitCode.PREEMPTED_SAVED:
            return "", "Yes: saved, and waiting"
        case "preempted":
            return "amber", "Waiting, not newly saved"
        case _ if status.warnings:
            return "red" if at_risk else "amber", "Not quite"
    return "", "Yes"


def _without_checkpoint(material: Material) -> tuple[Tone, str]:
    """Return what it means that no checkpoint is on the disk: at first, nothing."""
    found = material.goodput
    trained = found.wall_seconds - found.seconds(Category.SETUP)
    running = material.status.state in ("starting", "running")
    if running and not material.failures and trained < _FIRST_SAVE_SECONDS:
        return "", "Not yet: no save is due"
    return "red", "No: there is no checkpoint"


def _is_about_data(material: Material) -> bool:
    """Return whether a warning is about checkpoints, and not about nodes or steps alone."""
    status = material.status
    failed = status.last_save is not None and bool(status.last_save.error)
    return failed or (bool(status.rejected) and status.newest_intact is None)


def _good(material: Material) -> Found:
    history = material.history
    sentences = [*_verified(material)]
    refused = len(history.refused)
    if refused:
        last = history.refused[-1]
        name = last.path.rstrip("/").rpartition("/")[2]
        which = "Refused and not used" if refused == 1 else "The last that was refused"
        sentences.append(f"{which}: {name}, {_cut(last.reason)}.")
    failed = [one for one in history.saves if one.error]
    if failed:
        which = f"{len(failed):,} of {plural(len(history.saves), 'save')}"
        sentences.append(f"{which} failed, the last: {_cut(failed[-1].error)}.")
    elif history.saves:
        sentences.append("Every save was sealed.")
    lasting = [one for one in material.checkpoints if one.tier in _LASTING]
    intact = [one.intact for one in lasting]
    if lasting and not all(intact):
        place = _LASTING[lasting[0].tier]
        sentences.append(f"{place}, {sum(intact)} of {len(intact)} are intact.")
    if not sentences:
        sentences.append("No save is in the journal, and no checkpoint on the disk.")
    if material.status.newest_intact is None:
        if intact or refused:
            return "red", "No: none is intact", sentences
        return "", "There is none yet", sentences
    verdict = f"Yes; {refused} bad one{'s' * (refused != 1)} refused" if refused else "Yes"
    if history.saves and history.saves[-1].error:
        return "red", verdict, sentences
    return "amber" if refused or failed else "", verdict, sentences


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
        parts = [(number, way) for number, way in ways if number]
        if len(parts) == 1:
            yield f"{plural(passed, 'load')}, verified first {parts[0][1]}."
        else:
            listed = natural_list([f"{number} {way}" for number, way in parts])
            yield f"Each load was verified first: {listed}."
    newest = next((one for one in material.checkpoints if one.intact), None)
    if newest is not None and newest.tier in _LASTING:
        how = "every byte was verified" if newest.verified else "only the sizes were compared"
        yield f"Of the newest, {how}."


def _cost(material: Material) -> Found:
    found = material.goodput
    if not material.history.is_supervised:
        return _UNKNOWN
    whole = found.wall_seconds
    if whole <= 0:
        return "", "Nothing yet", []
    others = [(found.seconds(one), one) for one in Category if one is not Category.TRAINING]
    seconds, most = max(others, key=lambda one: one[0])
    sentences = ["The share of all time that was training which still counts."]
    if seconds >= _NEGLIGIBLE_SECONDS:
        sentences.append(f"Most of the rest was {CATEGORIES[most][0]}.")
    lost = sum(found.seconds(one) for one in _LOST)
    tone: Tone = "amber" if lost / whole > _TOLERATED else ""
    return tone, f"{share(found.training_seconds, whole)} goodput", sentences


_UNKNOWN: Final[Found] = (
    "", "Not known",
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
    return f"The newest {place} is step {newest.step:,}{age}."


def _cut(text: str, limit: int = _QUOTED) -> str:
    shown = text if len(text) <= limit else f"{text[:limit].rstrip()}…"
    return shown.rstrip(". ")


def _capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]

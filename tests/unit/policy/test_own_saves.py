"""The options about a script's own checkpoints."""

from __future__ import annotations

import re
import signal
from typing import Any

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.policy.own_saves import (
    CompleteWhen,
    OwnSaves,
    own_saves,
    parse_complete_when,
    signal_of,
    step_of,
)


def rules(**given: Any) -> OwnSaves:
    options: dict[str, Any] = {
        "watch": (), "complete_when": None, "on_notice": None, "resume_args": (),
        "finished_when": None,
    }  # fmt: skip
    return own_saves(**(options | given))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("trainer_state.json", CompleteWhen(marker="trainer_state.json")),
        ("global_step5/.metadata", CompleteWhen(marker="global_step5/.metadata")),
        ("quiet:20s", CompleteWhen(quiet=20.0)),
        ("quiet:2m", CompleteWhen(quiet=120.0)),
        ("exit", CompleteWhen()),
    ],
)
def test_when_a_checkpoint_is_complete(text: str, rule: CompleteWhen) -> None:
    assert parse_complete_when(text) == rule


@pytest.mark.parametrize("text", ["quiet:", "quiet:0.5s", "/etc/passwd", "../x", "*.json"])
def test_what_is_no_rule(text: str) -> None:
    with pytest.raises(UsageError, match="--complete-when"):
        parse_complete_when(text)


@pytest.mark.parametrize("name", ["signal:SIGTERM", "signal:TERM", "signal:sigterm"])
def test_a_signal_by_any_of_its_names(name: str) -> None:
    assert signal_of(name) is signal.SIGTERM


@pytest.mark.parametrize(
    "name", ["SIGTERM", "signal:KILL", "signal:SIGSTOP", "signal:9", "command:"]
)
def test_what_no_script_can_serve(name: str) -> None:
    with pytest.raises(UsageError, match="--on-notice"):
        signal_of(name)


def test_a_command_is_no_signal() -> None:
    assert signal_of("command:touch save") is None


@pytest.mark.parametrize(
    "given",
    [{"complete_when": "exit"}, {"resume_args": ("--resume {newest}",)}, {"finished_when": "done"}],
)
def test_options_that_need_something_to_watch(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="needs --watch"):
        rules(**given)


def test_arguments_are_words_and_the_path_is_one_of_them() -> None:
    found = rules(watch=("out/*",), resume_args=("--resume {newest}", "--from={newest}"))
    assert found.arguments("") == ()
    assert found.arguments("/a b/c") == ("--resume", "/a b/c", "--from=/a b/c")


def test_an_open_quote_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="--resume-args"):
        rules(watch=("out/*",), resume_args=("--resume '{newest}",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--resume {newst}", "{newst} is not known; {newest}"),
        ("'--resume {newest}'", 'in a job file write ["--resume", "{newest}"]'),
    ],
)
def test_arguments_that_no_script_understands(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        rules(watch=("out/*",), resume_args=(text,))


def test_braces_of_other_programs_are_left_alone() -> None:
    given = ("+ckpt={newest}", "run=${oc.env:RUN}", "name=${NAME}", "x={a: 1}")
    assert rules(watch=("out/*",), resume_args=given).arguments("/n")[1:] == (
        "run=${oc.env:RUN}", "name=${NAME}", "x={a:", "1}",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "step"), [("checkpoint-500", 500), ("epoch=3-step=120.ckpt", 120), ("last.ckpt", 0)]
)
def test_the_step_in_a_name(name: str, step: int) -> None:
    assert step_of(name) == step

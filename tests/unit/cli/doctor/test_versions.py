"""Which versions were tested together, and which are the nearest."""

from __future__ import annotations

import pytest

from elastic_ckpt.cli.doctor.versions import NAMES, TESTED, describe, nearest_tested, untested

OLD, LATEST = TESTED


@pytest.mark.parametrize("tried", TESTED, ids=describe)
def test_tested_versions_match_themselves(tried: dict[str, str]) -> None:
    assert set(tried) == set(NAMES)
    assert nearest_tested(tried) is tried
    assert untested(tried) == []


@pytest.mark.parametrize("tried", TESTED, ids=describe)
def test_a_build_and_a_patch_of_python_do_not_count(tried: dict[str, str]) -> None:
    found = {**tried, "Python": "3.11.9", "torch": tried["torch"] + "+cu124"}
    assert untested(found) == []
    assert nearest_tested(found) is tried


@pytest.mark.parametrize("tried", TESTED, ids=describe)
def test_without_colossalai_only_torch_and_python_count(tried: dict[str, str]) -> None:
    found = {"Python": "3.11.2", "torch": tried["torch"], "transformers": "4.99"}
    assert untested(found) == []
    assert untested({**found, "Python": "3.12.2"}) == ["Python"]


@pytest.mark.parametrize(
    ("found", "nearest", "differing"),
    [
        ({**OLD, "colossalai": "0.6.0"}, OLD, ["colossalai"]),
        ({**LATEST, "colossalai": "0.4.9"}, LATEST, ["colossalai"]),
        ({**LATEST, "Python": "3.13.1"}, LATEST, ["Python"]),
        ({**OLD, "torch": "2.6.0"}, OLD, ["torch"]),
        ({**OLD, "torch": "2.5.0"}, OLD, ["torch"]),
        ({**LATEST, "torch": "2.13.0a0+git1234"}, LATEST, ["torch"]),
        ({**LATEST, "peft": OLD["peft"]}, LATEST, ["peft"]),
        ({**OLD, "torch": "2.7.0", "peft": "0.15.0"}, OLD, ["torch", "peft"]),
        ({**OLD, "torch": "2.12.1", "peft": "0.19.0"}, LATEST, ["torch", "peft"]),
        ({**LATEST, "torch": "3.0.0", "peft": "1.0"}, LATEST, ["torch", "peft"]),
        ({"Python": "3.10.1", "torch": "2.8.1"}, OLD, ["Python", "torch"]),
        ({"Python": "3.11.1", "torch": "2.10"}, LATEST, ["torch"]),
        (
            {name: OLD[name] for name in NAMES if name != "peft"},
            OLD,
            ["peft"],
        ),
        ({"Python": "3.11", "torch": "of my own"}, OLD, ["torch"]),
    ],
    ids=lambda value: describe(value) if isinstance(value, dict) else "",
)
def test_the_nearest(found: dict[str, str], nearest: dict[str, str], differing: list[str]) -> None:
    assert nearest_tested(found) is nearest
    assert untested(found) == differing

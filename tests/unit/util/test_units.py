"""Durations and sizes: parsing and formatting."""

from __future__ import annotations

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.util.units import human_bytes, human_duration, parse_bytes, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("45", 45.0),
        ("90s", 90.0),
        ("6h30m", 23400.0),
        ("2d", 172800.0),
        (" 1d2h3m4s\n", 93784.0),
        ("1.5h", 5400.0),
        ("0", 0.0),
        ("1h30", 3630.0),
        ("6h 30m", 23400.0),
        *((human_duration(seconds), seconds) for seconds in (0.2, 90.0, 270.0, 21600.0, 172800.0)),
    ],
)
def test_parse_duration(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "s", "h", "-1", "+1", "1e3", "1  h", "30m6h", "1mi", "1h1h", "1w", "1H", "nan", "inf",
     ".5h", "1.h", "1_0", "٣s", "1" * 13, "1ms"],
)  # fmt: skip
def test_parse_duration_rejects(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid duration: write it like 6h30m") as raised:
        parse_duration(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("300000", 3e5),
        ("50MB", 5e7),
        ("50mb", 5e7),
        ("50M", 5e7),
        (" 1.5 GB\n", 1.5e9),
        ("64MiB", 64 * 2**20),
        ("2Gi", 2 * 2**30),
        *((human_bytes(size), size) for size in (7, 1, 1400, 2e9, 3.2e12)),
    ],
)
def test_parse_bytes(text: str, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "B", "MB", "-1", "1e6", "5PB", "50MB/s", "5iB", "1,5GB", "nan", "50 M B"]
)
def test_parse_bytes_rejects(text: str) -> None:
    with pytest.raises(UsageError, match="is not a valid size: write it like 50MB") as raised:
        parse_bytes(text)
    assert repr(text) in str(raised.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-1.0, "under 1 ms"),
        (0.0, "under 1 ms"),
        (0.0346, "0.035 s"),
        (0.2, "0.2 s"),
        (3.14, "3.1 s"),
        (90.0, "90 s"),
        (99.4, "99 s"),
        (100.0, "1.7 min"),
        (5400.0, "90 min"),
        (21600.0, "6 h"),
        (47.4 * 3600, "47 h"),
        (172800.0, "2 d"),
        (1e9, "11574 d"),
        (float("inf"), "inf d"),
    ],
)
def test_human_duration(seconds: float | None, text: str) -> None:
    assert human_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 Bytes"), (1, "1 Byte"), (999.7, "999 Bytes"), (1000, "1.0 kB"),
     (999_900, "999.9 kB"), (999_960, "1.0 MB"), (1_500_000, "1.5 MB"), (2_000_000_000, "2.0 GB"),
     (3.2e12, "3.2 TB"), (5e15, "5.0 PB")],
)  # fmt: skip
def test_human_bytes(count: float | None, text: str) -> None:
    assert human_bytes(count) == text

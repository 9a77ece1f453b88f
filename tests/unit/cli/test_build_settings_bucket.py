"""What ``run`` refuses beside a bucket, as it would be lost with the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.cli.run.command import settings_of
from elastic_ckpt.errors import UsageError


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ELASTIC_CKPT_DIR", raising=False)
    (tmp_path / "train.py").write_text("")
    return str(tmp_path / "train.py")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--dir", "s3://b/j", "--watch", "out/*"], "--watch: .* not copied"),
        (["--dir", "d", "--mirror", "s3://b/j", "--watch", "out/*"], "--watch: .* not copied"),
        (
            ["--dir", "s3://b/j", "--nnodes", "2", "--rdzv-endpoint", "h", "--bucket-rate", "1MB"],
            "upload each save themselves",
        ),
        (["--dir", "s3://b/j", "--from", "epoch-0_step-5"], "elastic-ckpt pull s3://b/j DIR"),
        (["--dir", "s3://b/j", "--mirror", "s3://b/k"], "--mirror is for a directory"),
        (["--dir", "d", "--bucket-rate", "50MB"], "need --mirror URL"),
        (["--dir", "d", "--mirror", "s3://b"], "prefix of the job's own"),
        (["--dir", "d", "--mirror", "s3://b/j", "--bucket-rate", "fast"], "not a valid size"),
        (["--dir", "d", "--mirror", "s3://b/j", "--mirror-every", "often"], "valid duration"),
        (["--dir", "d", "--local-dir", "x"], "--local-dir goes with --dir URL"),
    ],
)
def test_what_does_not_go_together(script: str, options: list[str], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        settings_of([*options, "--", script])


def test_nodes_that_share_a_bucket_must_name_the_same(script: str) -> None:
    nodes = ["--nnodes", "2", "--rdzv-endpoint", "h"]
    several = settings_of(["--dir", "s3://b/j", *nodes, "--", script])
    assert several.shared_url == several.terms["--dir"] == "s3://b/j"
    for alone in (["--dir", "s3://b/j"], ["--dir", "d", "--mirror", "s3://b/j", *nodes]):
        assert settings_of([*alone, "--", script]).shared_url == ""


def test_the_local_copy_is_this_urls_alone(script: str, tmp_path: Path) -> None:
    first = settings_of(["--dir", "s3://b/j", "--bucket-rate", "50MB", "--", script])
    other = settings_of(["--dir", "s3://c/j", "--", script])
    assert first.directory.parent == tmp_path / "elastic-ckpt"
    assert first.directory != other.directory
    assert first.name == other.name == "j"
    assert first.mirror is not None and first.mirror.is_place
    assert first.mirror.rate == 50e6

"""Which sources a machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_ckpt.errors import UsageError
from elastic_ckpt.notices.platforms import choose, detect, make_sources

AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"


@pytest.mark.parametrize(
    ("firmware", "found"),
    [
        ({}, []),
        ({"sys_vendor": "QEMU", "product_name": "Standard PC"}, []),
        ({"sys_vendor": "Amazon EC2"}, ["aws"]),
        ({"sys_vendor": "Xen", "bios_vendor": "Amazon EC2"}, ["aws"]),
        ({"sys_vendor": "Google", "product_name": "Google Compute Engine"}, ["gcp"]),
        ({"sys_vendor": "Microsoft Corporation", "chassis_asset_tag": AZURE_TAG}, ["azure"]),
        ({"sys_vendor": "Microsoft Corporation", "product_name": "Virtual Machine"}, []),
    ],
)
def test_firmware_identifies_the_cloud(tmp_path, monkeypatch, firmware, found) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for name, text in firmware.items():
        (tmp_path / name).write_text(f"{text}\n")
    assert detect(tmp_path) == found


def test_a_slurm_job_may_run_in_a_cloud(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "sys_vendor").write_text("Amazon EC2\n")
    assert detect(tmp_path) == ["slurm", "aws"]


def test_each_name_is_chosen_once_and_none_selects_nothing(monkeypatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert choose(["aws", "gcp", "aws"]) == ("aws", "gcp")
    with pytest.raises(UsageError, match="none excludes aws: leave one of them out"):
        choose(["aws", "none"])
    assert choose(["none"]) == ()
    names = [source.name for source in make_sources(["gcp", "azure"], Path("x"), 30.0)]
    assert names == ["gcp", "gcp-maintenance", "azure", "file"]


@pytest.mark.parametrize("name", ["oracle", "slurm"])
def test_an_unavailable_source_is_a_usage_error(monkeypatch, name: str) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UsageError, match="--notice-source"):
        choose([name])

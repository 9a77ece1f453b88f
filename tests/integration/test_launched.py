"""What a script gets from its launcher: the variables of torchrun and of srun."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.job import SCRIPTS, Job
from tests.marks import slow

SCRIPT = SCRIPTS / "launched.py"

pytestmark = pytest.mark.one_torch


def recorded(place: Path, launch: int, ranks: int = 2) -> list[dict[str, Any]]:
    return [json.loads((place / f"{launch}.{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.parametrize(
    "outer", [slow(()), ("SLURM_PROCID=7", "SLURM_NPROCS=9", "SLURM_LOCALID=5")]
)
def test_workers_get_the_variables_of_torchrun_and_srun(tmp_path, outer) -> None:
    """Even if the supervisor is itself a task of srun, with other values."""
    with Job(tmp_path, "--out", str(tmp_path), "--restart", script=SCRIPT) as job:
        job.prefix = ["env", "-u", "OMP_NUM_THREADS", *outer]
        assert job.start("--name", "told").wait() == 0, job.output()
    for launch in (0, 1):
        ports = set()
        for rank, message in enumerate(recorded(tmp_path, launch)):
            ports.add(message.pop("MASTER_PORT"))
            message.pop("TORCHELASTIC_ERROR_FILE", None)
            assert message == {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
                "ROLE_RANK": str(rank), "ROLE_NAME": "default_role",
                "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1",
                "ROLE_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
                "TORCHELASTIC_RUN_ID": f"told.{launch + 1}",
                "TORCHELASTIC_RESTART_COUNT": str(launch), "TORCHELASTIC_MAX_RESTARTS": "0",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
                "SLURM_NPROCS": "2", "SLURM_NTASKS": "2",
            }  # fmt: skip
        assert len(ports) == 1


@pytest.mark.slow
@pytest.mark.parametrize("by", ["torch", "slurm"])
def test_colossalai_launches_from_torch_and_slurm_variables(tmp_path: Path, by: str) -> None:
    pytest.importorskip("colossalai", reason="ColossalAI is not installed")
    with Job(tmp_path, "--by", by, "--out", str(tmp_path), script=SCRIPT) as job:
        job.prefix = ["env", "SLURM_PROCID=0", "SLURM_NPROCS=1"]  # of the supervisor's own task
        assert job.start().wait(120) == 0, job.output()
    assert recorded(tmp_path, 0) == [{"rank": rank, "size": 2, "total": 3.0} for rank in (0, 1)]


def test_workers_find_the_preloaded_modules_and_no_trace_of_their_import(tmp_path: Path) -> None:
    """What a module sets in the environment stays: the script would get it by importing it."""
    (tmp_path / "preloaded.py").write_text("import os\nos.environ['SET_BY_IMPORT'] = '1'\n")
    asked = ["torch", "preloaded", "not_preloaded"]
    with Job(tmp_path, "--out", str(tmp_path), "--modules", *asked, script=SCRIPT) as job:
        job.packages = [tmp_path]
        assert job.start("--preload", "preloaded,missing").wait() == 0, job.output()
    for rank in recorded(tmp_path, 0):
        assert rank["imported"] == ["torch", "preloaded"]
        assert "SET_BY_IMPORT" in rank["environment"]
        for only_while_importing in ("TORCH_WARM_POOL", "PYTORCH_NVML_BASED_CUDA_CHECK"):
            assert only_while_importing not in rank["environment"]

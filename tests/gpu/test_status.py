"""What status and doctor report about a real GPU: the driver answers with plausible numbers."""

import os

import pytest
import torch

from elastic_ckpt.cli.doctor.gpus import check_gpus
from elastic_ckpt.cli.status.workers import gpus_by_pid
from elastic_ckpt.util.gpus import find_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_gpu_memory_of_this_process():
    held = torch.zeros(2**28, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    found = gpus_by_pid()
    if os.getpid() not in found:
        pytest.skip("the driver counts processes in another PID namespace than this container's")
    assert found[os.getpid()].bytes >= held.numel()
    assert 0 <= found[os.getpid()].percent <= 100


def test_doctor_finds_the_gpus_that_torch_finds():
    gpus = find_gpus()
    assert len(gpus.devices) >= torch.cuda.device_count()
    findings = list(check_gpus(gpus, torch.cuda.device_count()))
    assert findings and not [one for one in findings if one.state == "problem"]

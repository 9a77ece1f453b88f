"""The rule that a Session is given is noted in the job directory, for the copies in a bucket."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elastic_ckpt.jobdir.paths import JobDirectory
from elastic_ckpt.jobdir.retention_file import read_rule
from elastic_ckpt.policy.retention import Retention

SCRIPT = """
import sys
import torch
from elastic_ckpt import Retention, Session

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for name, rule in (("", {first}), ("fold0", {second})):
    with Session(sys.argv[1], name=name, model=model, optimizer=optimizer, retention=rule):
        pass
"""


def run(directory: Path, first: str, second: str = "None") -> None:
    script = SCRIPT.replace("{first}", first).replace("{second}", second)
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.one_torch
def test_rule_of_each_session_is_noted_and_replaced_by_the_next_runs(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path / "job")
    run(job.root, "Retention(last=2, best=1, metric='loss')", "Retention(every=100)")
    assert read_rule(job) == Retention(last=2, best=1, metric="loss")
    assert read_rule(job.session("fold0")) == Retention(every=100)
    run(job.root, "Retention(last=5)", "Retention(last=3)")
    assert read_rule(job) == Retention(last=5)
    assert read_rule(job.session("fold0")) == Retention(last=3)

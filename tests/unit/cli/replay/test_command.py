"""Whose command a replay runs."""

from __future__ import annotations

import os

import pytest

from elastic_ckpt.cli.replay import command
from elastic_ckpt.errors import UsageError
from elastic_ckpt.jobdir.paths import JobDirectory


def test_the_command_of_another_users_directory_is_not_run(
    job: JobDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UsageError, match="belongs to another user"):
        command._command(job)


def test_a_directory_that_names_no_command_is_said(job: JobDirectory) -> None:
    with pytest.raises(UsageError, match="does not say how the job was started"):
        command._command(job)

"""The class of a failure."""

from __future__ import annotations

import pytest

from elastic_ckpt.policy.failure import Failure, FailureClass


@pytest.mark.parametrize(
    ("exit_code", "message", "stepped", "kind"),
    [
        (1, "ModuleNotFoundError: No module named 'missing'", False, FailureClass.START_UP),
        (2, "exit code 2", False, FailureClass.START_UP),
        (1, "ValueError: no", True, FailureClass.ERROR),
        (0, "it exited with code 0 before", False, FailureClass.ERROR),
        (70, "NonFiniteLoss: the loss of step 7 is nan", True, FailureClass.NON_FINITE),
        (1, "OutOfMemoryError: CUDA out of memory. Tried", True, FailureClass.DEVICE_MEMORY),
        (1, "RuntimeError: CUDA out of memory. Tried", True, FailureClass.DEVICE_MEMORY),
        (1, "OutOfMemoryError: CUDA out of memory. Tried", False, FailureClass.DEVICE_MEMORY),
        (70, "StorageFailed: rank 0 could not load: I/O error", False, FailureClass.STORAGE),
        (-9, "killed by SIGKILL", True, FailureClass.SIGNAL),
        (-9, "killed by SIGKILL", False, FailureClass.SIGNAL),
        (-15, "killed by SIGTERM", True, FailureClass.SIGNAL),
        (-11, "killed by SIGSEGV", True, FailureClass.FAULT),
        (-7, "killed by SIGBUS", False, FailureClass.FAULT),
        (-6, "killed by SIGABRT", True, FailureClass.FAULT),
    ],
)  # fmt: skip
def test_the_class_follows_from_exit_code_and_message(
    exit_code: int, message: str, stepped: bool, kind: FailureClass
) -> None:
    assert Failure(1, exit_code, message, stepped).kind is kind


@pytest.mark.parametrize(
    ("rank", "exit_code", "kind"),
    [
        (1, -9, FailureClass.HOST_MEMORY),
        (-1, -9, FailureClass.SIGNAL),  # the agent: the kernel may have killed another process
        (1, -15, FailureClass.SIGNAL),
        (1, 1, FailureClass.ERROR),
    ],
)
def test_an_out_of_memory_kill_is_only_assumed_for_a_worker_killed_by_sigkill(
    rank: int, exit_code: int, kind: FailureClass
) -> None:
    assert Failure(rank, exit_code, "", True, out_of_memory=True).kind is kind


def test_workers_that_could_not_be_launched_are_no_killed_worker() -> None:
    message = "the workers could not be launched: OSError: File name too long"
    assert Failure(-1, 70, message, stepped=False).kind is FailureClass.LAUNCH
    assert Failure(-1, 0, message, stepped=False).kind is FailureClass.ERROR  # a lost connection
    assert Failure(2, 70, message, stepped=True).kind is FailureClass.ERROR  # a script's own words


def test_worker_that_lived_for_long_has_started() -> None:
    assert Failure(0, 1, "", stepped=False, lived=59.0).kind is FailureClass.START_UP
    assert Failure(0, 1, "", stepped=False, lived=61.0).kind is FailureClass.ERROR

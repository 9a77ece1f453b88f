"""Contracts on the source that import rules cannot express."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

PACKAGE = Path(__file__).parents[2] / "elastic_ckpt"

# -- private names of libraries -------------------------------------------------------------------

LIBRARIES: Final = ("torch", "multiprocessing", "concurrent", "threading", "atexit", "colossalai")

PRIVATE_NAMES: Final = {
    # Imported by name ahead of its use; the template skips it if it is gone.
    ("supervisor/agent/template_process.py", "torch._dynamo"),
    # A worker is forked and leaves by os._exit; there is no public way to end an interpreter.
    ("training/worker/worker.py", "_shutdown"),
    ("training/worker/worker.py", "_run_exitfuncs"),
    # A DataLoader's children have no hook for their signal handlers.
    ("training/worker/signal_shield.py", "_MultiProcessingDataLoaderIter"),
    ("training/worker/signal_shield.py", "_set_worker_signal_handlers"),
    ("training/worker/signal_shield.py", "torch.utils.data._utils.signal_handling"),
    # The store of the default process group, to reach ranks that the group's collectives do not.
    ("training/ranks/job_store.py", "_get_default_store"),
    # ColossalAI on a CPU, for trying it without a GPU; the tests pin the version.
    ("training/engines/colossalai/cpu_shim.py", "_sanity_checks"),
    ("training/engines/colossalai/cpu_shim.py", "_name"),
    ("training/engines/colossalai/cpu_shim.py", "torch.distributed.fsdp._flat_param"),
    # Keeps ColossalAI from unpickling code.
    ("training/engines/colossalai/engine.py", "_unpickler"),
}
"""Where the package uses a private name of a library, and why there is no other way."""


def private_names(source: str) -> Iterator[str]:
    """Yield private attributes and modules of ``LIBRARIES`` that the source uses."""
    tree = ast.parse(source)
    tainted: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                path = f"{module}.{alias.name}" if module else alias.name
                if path.split(".")[0] in LIBRARIES:
                    tainted.add(alias.asname or (alias.name if module else path.split(".")[0]))
                    if _is_private(path):
                        yield module or path
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path = node.value
            if re.fullmatch(rf"({'|'.join(LIBRARIES)})(\.\w+)*", path):
                tainted.add(path)
                if _is_private(path):
                    yield path
    before = -1
    while len(tainted) > before:  # what is assigned from a library's object is the library's
        before = len(tainted)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and _root(node.value) & tainted:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                tainted |= {target.id for target in targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node) & tainted:
            yield node.attr


def _is_private(path: str) -> bool:
    return any(re.match(r"_(?!_)", part) for part in path.split("."))


def _root(node: ast.AST | None) -> set[str]:
    """Return the name that an expression starts from; for ``import_module`` its argument."""
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            return {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
        node = node.func if isinstance(node, ast.Call) else node.value
    return {node.id} if isinstance(node, ast.Name) else set()


def test_private_names_of_libraries_are_listed_with_a_reason() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name in private_names(path.read_text())
    }
    assert found == PRIVATE_NAMES


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import multiprocessing\nmultiprocessing.process._children", ["_children"]),
        ("from multiprocessing import forkserver as f\nx = f\nx._forkserver.pid", ["_forkserver"]),
        ("import torch._C", ["torch._C"]),
        ("from torch._C import x", ["torch._C"]),
        ("from torch.distributed import _functional_collectives as f", ["torch.distributed"]),
        ("from importlib import import_module\nx = import_module('torch')\nx._C", ["_C"]),
        ("from colossalai.accelerator import get\na = get()\na._name", ["_name"]),
        ("import torch\nself._x = torch.zeros(1)\ntorch.Tensor.__init__", []),
        ("import os\nos._exit(0)", []),
    ],
)  # fmt: skip
def test_private_names_are_found(source: str, expected: list[str]) -> None:
    assert list(private_names(source)) == expected


# -- wire types -----------------------------------------------------------------------------------

WIRE_PACKAGES: Final = ("protocol", "jobdir", "journal")
"""Define what crosses a process or a file of ``.elastic-ckpt``."""

OTHER_STRUCTS: Final = {
    "checkpoint/archive.py",
    "checkpoint/bucket/ownership.py",
    "checkpoint/bucket/take.py",
    "checkpoint/own/announced.py",
    "checkpoint/own/seal.py",
    "checkpoint/own/watched.py",
    "cli/run/interpreter.py",  # the answer of the workers' Python
    "cli/slurm/queue.py",  # a part of status --json
    # The checkpoint format, in the checkpoint's own files (docs/format.md).
    "checkpoint/manifest.py",
    "checkpoint/memory/seal.py",
    "checkpoint/position.py",
    "checkpoint/quarantine.py",
    "checkpoint/remote_note.py",
    "checkpoint/colossalai_layout.py",
    "training/tensors/shard_index.py",
    "training/tensors/safetensors_file.py",
    "training/engines/colossalai/loss_scale.py",
    # What nodes say to each other about what is in their memory.
    "checkpoint/nodes/link.py",
    "checkpoint/nodes/tier.py",
    # What ranks exchange before a pass over the data and before a save.
    "training/state/target.py",
    "training/data/opening.py",
    "training/state/meeting.py",
    # Owners of a lock and of a memory tier, which belong to the code that takes them.
    "checkpoint/ownership/fence.py",
    "checkpoint/ownership/job_lock.py",
    "checkpoint/memory/owner.py",
    "cli/leftovers.py",
    "cli/replay/command.py",
    "cli/report/figures.py",
    # The learned model is the decision's own state; jobdir/prediction_file.py stores it.
    "policy/prediction.py",
    # Answers of metadata services.
    "notices/aws.py",
    "notices/azure.py",
    # What commands print as JSON, and what their short-lived children answer them.
    "cli/doctor/directory.py",
    "cli/doctor/findings.py",
    "cli/doctor/gpus.py",
    "cli/doctor/machine.py",
    "cli/doctor/storage_trial.py",
    "cli/drill.py",
    "util/gpus.py",
    "cli/status/problems.py",
    "cli/status/progress.py",
    "cli/status/run.py",
    "cli/status/saves.py",
    "cli/status/nodes.py",
    "cli/status/view.py",
    "cli/status/workers.py",
}
"""Other files that define msgspec types."""


def defines_struct(source: str) -> bool:
    """Whether the source defines a msgspec type."""
    bases = [
        ast.unparse(base)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    ]
    return bool({"msgspec.Struct", "Struct"} & set(bases))


def test_wire_types_are_defined_only_in_their_packages() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        if defines_struct(path.read_text())
    }
    elsewhere = {path for path in found if path.split("/")[0] not in WIRE_PACKAGES}
    assert elsewhere == OTHER_STRUCTS


def test_a_wire_type_is_found() -> None:
    assert defines_struct("import msgspec\nclass Ping(msgspec.Struct, frozen=True):\n    x: int")
    assert not defines_struct("import msgspec\nclass Ping:\n    x: msgspec.Struct")

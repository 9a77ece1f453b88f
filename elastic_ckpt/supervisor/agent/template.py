"""Imported first by the template, the process that workers are forked from.

Ties the template to the agent's life; workers do not inherit that and tie themselves to the
template. Also keeps the imports that follow from printing warnings that no script could silence,
from starting processes and from using a GPU, until :func:`leave` in each worker.
"""

import os
import warnings
from typing import Final

from elastic_ckpt.util.processes import die_with_parent

_WHILE_IMPORTING: Final = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asks whether there is a GPU without using it
    "TORCH_WARM_POOL": "0",  # torch.compile's processes, and a thread that a fork would lose
}

die_with_parent()

_quiet = warnings.catch_warnings()
_quiet.__enter__()
warnings.simplefilter("ignore")

_before = {name: os.environ.get(name) for name in _WHILE_IMPORTING}
os.environ.update(_WHILE_IMPORTING)


def leave() -> None:
    """Undo in a worker what was for the imports alone; variables that modules set stay."""
    _quiet.__exit__(None, None, None)
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

"""Preloaded by the forkserver, the process that workers are forked from.

Importing this ties the forkserver to the agent's life; workers do not inherit that and tie
themselves to the forkserver. It also keeps what is preloaded after it from printing warnings that
no script could silence, and from starting processes or using a GPU; ``quiet`` is left again in
each worker, ``learned_imports.py`` comes last and takes the rest back.
"""

import os
import warnings
from typing import Final

from elastic_ckpt.util.processes import die_with_parent

_WHILE_IMPORTING: Final = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU is asked without using it
    "TORCH_WARM_POOL": "0",  # torch.compile's processes, and a thread that a fork would lose
}

die_with_parent()

quiet = warnings.catch_warnings()
quiet.__enter__()
warnings.simplefilter("ignore")

_before = {name: os.environ.get(name) for name in _WHILE_IMPORTING}
os.environ.update(_WHILE_IMPORTING)


def restore_environment() -> None:
    """Take back what only the imports were to see; what they set themselves stays.

    The script would get that by importing the same modules.
    """
    for name, value in _before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

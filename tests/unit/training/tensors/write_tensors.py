"""Write a safetensors file for a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from elastic_ckpt.training.tensors.safetensors_file import layout_of, make_header, write_file


def write_tensors(file: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the header and all tensors."""
    write_file(file, make_header(layout_of(tensors)), tensors)

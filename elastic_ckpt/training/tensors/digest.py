"""Digests of values, by which the ranks see whether they hold the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, Final

import torch
import xxhash

from elastic_ckpt.training.tensors.device_copy import flat_bytes, is_on_device
from elastic_ckpt.training.tensors.state_codec import TreeEncoder, check_tensor

DIGEST_BYTES: Final = 8

_SMALL_BYTES: Final = 1024 * 1024
"""A device's smaller tensors are fetched together: each copy from it costs a round trip."""

_CHUNK_BYTES: Final = 32 * 1024 * 1024


def digest_values(values: Mapping[str, Any]) -> dict[str, bytes]:
    """Return a digest of each value, of ``DIGEST_BYTES``; equal bits have equal digests.

    Raises:
        UsageError: a value cannot be saved.
    """
    hashes: dict[str, xxhash.xxh3_64] = {}
    found: list[tuple[str, torch.Tensor]] = []
    for name, value in values.items():
        tensors: dict[str, torch.Tensor] = {}
        if isinstance(value, torch.Tensor):  # most are, and there may be hundreds
            check_tensor(value, name)
            tensors[""], tree = value, ""
        else:
            tree = json.dumps(TreeEncoder(tensors).encode(value))
        hashes[name] = xxhash.xxh3_64(tree.encode())
        for inside, tensor in tensors.items():
            hashes[name].update(f"{inside} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.append((name, flat_bytes(tensor)))
    fetched = _fetch_small(flat for _, flat in found)
    for name, flat in found:
        for chunk in torch.split(fetched.get(id(flat), flat), _CHUNK_BYTES):
            if chunk.numel():
                data: Any = chunk.cpu().numpy()
                hashes[name].update(data)
    return {name: one.digest() for name, one in hashes.items()}


def digest_name(name: str) -> bytes:
    """Return what stands for a name in an exchange, of ``DIGEST_BYTES``."""
    return xxhash.xxh3_64_digest(name.encode(errors="replace"))


def _fetch_small(flats: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return the contents of a device's small tensors by their ids, with one copy per device."""
    small = [one for one in flats if is_on_device(one) and one.numel() <= _SMALL_BYTES]
    fetched: dict[int, torch.Tensor] = {}
    for _, group in groupby(sorted(small, key=lambda one: str(one.device)), lambda one: one.device):
        together = list(group)
        parts = torch.split(torch.cat(together).cpu(), [one.numel() for one in together])
        fetched.update(zip(map(id, together), parts, strict=True))
    return fetched

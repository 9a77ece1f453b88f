"""Is this the data set that the checkpoint was made with?"""

from __future__ import annotations

import random
import sys
from typing import Any, Final

import torch
import xxhash

from elastic_ckpt.training.state.rng import preserved_rng

_PROBES: Final = 8


def dataset_fingerprint(dataset: Any) -> str:
    """A digest of a data set: what it says of itself, or its length and a few samples.

    A data set with a string attribute ``fingerprint`` (or ``_fingerprint``, as Hugging Face's
    have) is taken at its word. Otherwise eight samples, spread evenly, are read under a fixed
    random state. If reading one twice gives two results, the length alone counts.
    """
    for name in ("fingerprint", "_fingerprint"):
        given = getattr(dataset, name, None)
        if isinstance(given, str):
            return xxhash.xxh3_128_hexdigest(given.encode())
    size = len(dataset)
    digest = xxhash.xxh3_128(str(size).encode())
    contents = _probe(dataset, size)
    if contents == _probe(dataset, size):
        digest.update(contents)
    return digest.hexdigest()


def _probe(dataset: Any, size: int) -> bytes:
    digest = xxhash.xxh3_128()
    with preserved_rng():
        for index in sorted({probe * (size - 1) // (_PROBES - 1) for probe in range(_PROBES)}):
            _fix_rng(index)
            _update(digest, dataset[index])
    return digest.digest()


def _fix_rng(seed: int) -> None:
    # Not torch.manual_seed: that seeds every accelerator too, and even those not in use yet.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _update(digest: xxhash.xxh3_128, value: Any) -> None:
    """Add what has a stable form; of anything else only the name of its type."""
    digest.update(type(value).__name__.encode())
    match value:
        case torch.Tensor():
            dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
            flat = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        case bytes() | bytearray():
            digest.update(b"%d:" % len(value) + bytes(value))
        case str() | int() | float() | None:
            digest.update(_plain(value))
        case dict():
            digest.update(b"%d:" % len(value))
            for key in sorted(value, key=repr):
                _update(digest, key)
                _update(digest, value[key])
        case list() | tuple():
            digest.update(b"%d:" % len(value))
            for item in value:
                _update(digest, item)
        case _ if hasattr(value, "tobytes"):
            shape, dtype = getattr(value, "shape", ""), getattr(value, "dtype", "")
            digest.update(f"{shape}{dtype}".encode())
            digest.update(value.tobytes())


def _plain(value: Any) -> bytes:
    """As plain Python writes it: NumPy's scalars write themselves differently since 2.0."""
    for kind in (str, float, int):
        if isinstance(value, kind):
            return kind.__repr__(value).encode()
    return b""

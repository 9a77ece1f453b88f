"""A fingerprint that tells whether a checkpoint was made with the same data set."""

from __future__ import annotations

import random
import sys
from typing import Any, Final

import torch
import xxhash

from elastic_ckpt.training.state.rng import preserved_rng

_PROBES: Final = 8


def dataset_fingerprint(dataset: Any) -> str:
    """Return a digest of a data set: of its own fingerprint, or of its length and a few samples.

    A string attribute ``fingerprint`` (or ``_fingerprint``, as in Hugging Face's data sets) is used
    as it is. Otherwise eight samples, spread evenly, are read under a fixed random state. If
    reading them twice gives different results, only the length counts.
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
    # Not torch.manual_seed, which also seeds every accelerator, even one that is not in use.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _update(digest: xxhash.xxh3_128, value: Any) -> None:
    """Add a value if it has a stable form, otherwise only the name of its type."""
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
    """Return the plain Python value's repr: that of NumPy's scalars changed in 2.0."""
    for kind in (str, float, int):
        if isinstance(value, kind):
            return kind.__repr__(value).encode()
    return b""

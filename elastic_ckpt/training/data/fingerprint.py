"""A fingerprint that tells whether a checkpoint was made with the same data set."""

from __future__ import annotations

import random
import sys
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Final

import torch
import xxhash

from elastic_ckpt.training.state.rng import preserved_rng

_PROBES: Final = 8
_MAX_FIELDS: Final = 32
_NAME_CHARACTERS: Final = 80
_WHOLE: Final = "sample"
"""The name of the only field of a sample that is neither a dictionary nor a tuple."""

Fields = dict[str, str]
"""Digests of a sample's fields, by name, over all samples that were read."""


class DataIdentity:
    """What tells one data set from another.

    A string attribute ``fingerprint`` is the user's word and is trusted alone. ``_fingerprint``,
    which Hugging Face's data sets derive from paths and functions as well, may differ for equal
    data: then the samples decide. Eight samples, spread evenly, are read twice under a fixed random
    state; what differs between the two readings does not count. Of an absolute path or a URL only
    the last component counts, because data are staged to other directories.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._given = _own(dataset, "fingerprint")
        self._own = self._given or _own(dataset, "_fingerprint")

    @cached_property
    def digest(self) -> str:
        """The digest of its own fingerprint, or of its length and samples."""
        if self._own is not None:
            return xxhash.xxh3_128_hexdigest(self._own.encode())
        digest = xxhash.xxh3_128(str(len(self._dataset)).encode())
        contents, again = self._probes
        if contents[0] == again[0]:
            digest.update(contents[0])
        return digest.hexdigest()

    @property
    def fields(self) -> Fields:
        """The digests of its samples' fields; empty if the user's word counts."""
        return {} if self._given is not None else self._read

    def is_same(self, digest: str, fields: Fields) -> bool:
        """Return whether these belong to the same data.

        A ``fingerprint`` that is the digest itself counts as the same: so the user declares it.
        """
        if digest in (self.digest, self._given):
            return True
        return bool(fields) and fields == self._read

    def difference(self, fields: Fields) -> str:
        """Describe what differs from another data set of the same length."""
        if not fields or not self._read:
            return "its fingerprint differs"
        return describe_difference(fields, self._read)

    @cached_property
    def _read(self) -> Fields:
        (_, found), (_, again) = self._probes
        return {name: digest for name, digest in found.items() if again.get(name) == digest}

    @cached_property
    def _probes(self) -> tuple[tuple[bytes, Fields], tuple[bytes, Fields]]:
        return _probe(self._dataset), _probe(self._dataset)


def describe_difference(fields: Fields, others: Fields) -> str:
    """Describe which fields of the samples differ, and which do not."""
    same = [name for name, digest in fields.items() if others.get(name) == digest]
    different = sorted({*fields, *others} - {*same})
    if not same or different == [_WHOLE]:
        return "its samples differ"
    fields_are = "fields" if len(different) > 1 else "field"
    return (
        f"its samples differ in {fields_are} {', '.join(map(repr, different))} "
        f"(equal: {', '.join(map(repr, sorted(same)))})"
    )


def _own(dataset: Any, name: str) -> str | None:
    given = getattr(dataset, name, None)
    return given if isinstance(given, str) else None


def _probe(dataset: Any) -> tuple[bytes, Fields]:
    """Return a digest of the samples as version one made it, and those of their fields."""
    whole, fields = xxhash.xxh3_128(), dict[str, xxhash.xxh3_128]()
    last = len(dataset) - 1
    with preserved_rng():
        for index in sorted({probe * last // (_PROBES - 1) for probe in range(_PROBES)}):
            _fix_rng(index)
            sample = dataset[index]
            _update(whole, sample)
            for name, value in _parts(sample):
                _update(fields.setdefault(name, xxhash.xxh3_128()), value, paths=False)
    return whole.digest(), {name: digest.hexdigest() for name, digest in fields.items()}


def _parts(sample: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[Any, Any]] = [(_WHOLE, sample)]
    if isinstance(sample, dict):
        parts = sorted(sample.items(), key=lambda item: repr(item[0]))
    elif isinstance(sample, tuple):
        parts = list(enumerate(sample))
    rest = [value for _, value in parts[_MAX_FIELDS:]]
    named = [(str(name)[:_NAME_CHARACTERS], value) for name, value in parts[:_MAX_FIELDS]]
    return [*named, ("others", rest)] if rest else named


def _fix_rng(seed: int) -> None:
    # Not torch.manual_seed, which also seeds every accelerator, even one that is not in use.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


def _update(digest: xxhash.xxh3_128, value: Any, *, paths: bool = True) -> None:
    """Add a value if it has a stable form, otherwise only the name of its type.

    Args:
        paths: whether the directories of absolute paths count.
    """
    digest.update(type(value).__name__.encode())
    match value:
        case torch.Tensor():
            dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
            flat = dense.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        case bytes() | bytearray():
            digest.update(b"%d:" % len(value) + bytes(value))
        case str() if not paths and (value.startswith("/") or "://" in value):
            digest.update(_plain(PurePosixPath(value).name))
        case str() | int() | float() | None:
            digest.update(_plain(value))
        case dict():
            digest.update(b"%d:" % len(value))
            for key in sorted(value, key=repr):
                _update(digest, key)
                _update(digest, value[key], paths=paths)
        case list() | tuple():
            digest.update(b"%d:" % len(value))
            for item in value:
                _update(digest, item, paths=paths)
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

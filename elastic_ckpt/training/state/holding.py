"""What one rank holds at a save, and the others may hold differently."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Final

from elastic_ckpt.training.state.module_values import module_values
from elastic_ckpt.training.tensors.digest import DIGEST_BYTES, digest_name, digest_values

Names = frozenset[bytes]
"""Values that differ between ranks, as :func:`digest_name` calls them."""

_ENTRY: Final = 2 * DIGEST_BYTES


class Holding:
    """The model's buffers and the script's extra objects, as they are now.

    Each rank sends its digests in the first exchange of a save; what differs between ranks is then
    written by each of them, and what is equal by rank 0 alone.
    """

    def __init__(self, model: Any, extra: Mapping[str, Any]) -> None:
        """Never raises: :meth:`to_write` does, where all ranks learn of it."""
        self._model: dict[str, Any] = {}
        self._extra: dict[str, Any] = {}
        self._failure: Exception | None = None
        try:
            self._extra = {_extra(name): thing.state_dict() for name, thing in extra.items()}
            self._model = {_model(name): value for name, value in module_values(model).items()}
        except Exception as error:  # the script's own objects raise anything
            self._failure = error

    def digests(self) -> tuple[bytes, bytes]:
        """Return digests of the model's values and of the extra objects, to compare with others'.
        What cannot be compared gets one that no other rank has."""
        return _packed(self._model), _packed(self._extra)

    def to_write(self, rank: int, unequal: Names) -> dict[str, Any]:
        """Return what this rank writes of its own.

        Raises:
            Exception: what an object's ``state_dict`` raised.
        """
        if self._failure is not None:
            raise self._failure
        differ = {name for name in (*self._extra, *self._model) if digest_name(name) in unequal}
        return {
            "extra": {
                _bare(name): state
                for name, state in self._extra.items()
                if rank == 0 or name in differ
            },
            "shared": [_bare(name) for name in self._extra if name not in differ],
            "model": {_bare(name): self._model[name] for name in self._model if name in differ},
        }


def unequal_names(model: Iterable[bytes], extra: Iterable[bytes]) -> Names:
    """Return what differs between ranks, from the digests of all of them.

    An extra object that a rank lacks counts as different. A buffer does not: with a pipeline each
    rank has those of its stage, which the engine saves.
    """
    return _differing(model, of_all=False) | _differing(extra, of_all=True)


def _differing(digests: Iterable[bytes], *, of_all: bool) -> Names:
    ranks = list(digests)
    if len(set(ranks)) == 1:
        return frozenset()
    found: defaultdict[bytes, set[bytes]] = defaultdict(set)
    holders: defaultdict[bytes, int] = defaultdict(int)
    for packed in ranks:
        for at in range(0, len(packed), _ENTRY):
            name, value = packed[at : at + DIGEST_BYTES], packed[at + DIGEST_BYTES : at + _ENTRY]
            found[name].add(value)
            holders[name] += 1
    return frozenset(
        name
        for name, values in found.items()
        if len(values) > 1 or (of_all and holders[name] < len(ranks))
    )


def _packed(values: dict[str, Any]) -> bytes:
    try:
        digests = digest_values(values)
    except Exception:  # as of a type that cannot be saved: the write raises it on all ranks
        digests = {name: secrets.token_bytes(DIGEST_BYTES) for name in values}
    return b"".join(digest_name(name) + digest for name, digest in digests.items())


def _extra(name: str) -> str:
    return f"extra/{name}"


def _model(name: str) -> str:
    return f"model/{name}"


def _bare(name: str) -> str:
    return name.partition("/")[2]

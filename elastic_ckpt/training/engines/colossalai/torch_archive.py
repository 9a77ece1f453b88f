"""The archive that ``torch.save`` writes, laid out before its first byte is written.

Torch itself lays out the archive: under ``torch.serialization.skip_data`` it writes everything but
the storages and seeks over their places. The layout and the size are then known, and each storage
is copied once, directly to its place.

Two fields differ from a plain ``torch.save``. The CRC-32 of a storage's record is zero, because
computing it would take three times as long as the copy. The archive's serialization id, which torch
derives from the checksums, identifies layouts but not values. No version of ``torch.load`` checks
them (torch can omit them, too, with ``set_crc32_options``), while ``unzip -t`` and Python's
``zipfile`` report a bad CRC for these records. The digests of the checkpoint's manifest protect the
bytes.
"""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Final

import torch
from torch.serialization import save as plain_save
from torch.serialization import skip_data

from elastic_ckpt.checkpoint.tier import Part, Sink

_LOCAL_HEADER: Final = b"PK\x03\x04"
_NAME_LENGTH_AT: Final = 26
_NAME_AT: Final = 30


@dataclass(frozen=True)
class Archive:
    """One planned file: its contents, in order. A storage is not copied before it is written."""

    pieces: list[bytes | torch.UntypedStorage]

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return self.tensor_bytes + sum(len(p) for p in self.pieces if isinstance(p, bytes))

    @property
    def tensor_bytes(self) -> int:
        """The bytes of the storages, each counted once."""
        return sum(p.nbytes() for p in self.pieces if not isinstance(p, bytes))

    def write(self, file: Sink) -> None:
        """Write the file; storages on another device pass through the CPU, one at a time."""
        for piece in self.pieces:
            file.write(piece if isinstance(piece, bytes) else _view(piece))


def plan_archive(obj: Any) -> Archive | None:
    """Return what ``torch.save(obj, ...)`` would write, or raise what it raises. None if torch
    itself has to write it: it cannot lay it out before (quantized tensors), or does so in an
    unknown way."""
    storages: dict[str, torch.UntypedStorage] = {}
    layout = _Layout(storages)

    class Pickler(_Pickler):
        noted = storages

    module: Any = SimpleNamespace(__name__="pickle", Pickler=Pickler)
    try:
        with skip_data():
            plain_save(obj, layout, pickle_module=module)  # type: ignore[arg-type]
        return layout.archive()
    except RuntimeError:
        return None
    finally:
        storages.clear()  # the class would keep them alive until the next garbage collection


@dataclass
class _Layout:
    """The file that torch writes to while it skips the data."""

    storages: dict[str, torch.UntypedStorage]
    pieces: list[bytes | torch.UntypedStorage] = field(default_factory=list)
    known: bool = True
    _pending: bytearray = field(default_factory=bytearray)
    _at: int = 0

    def write(self, data: Any) -> int:
        self._pending += data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Record the storage whose place torch skips, just after it wrote the local header."""
        start = self._pending.rfind(_LOCAL_HEADER)
        if whence != 1 or offset <= 0 or start < 0:
            self.known = False
            return self._at
        storage = self.storages.pop(_record_name(self._pending, start), None)
        if storage is None or storage.nbytes() != offset:
            self.known = False
            return self._at
        self.pieces += [bytes(self._pending), storage]
        self._pending.clear()
        self._at += offset
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def archive(self) -> Archive | None:
        """Return the archive if every storage has found its place."""
        if not self.known or any(storage.nbytes() for storage in self.storages.values()):
            return None
        return Archive([*self.pieces, bytes(self._pending)])


class _Pickler:
    """Pickles for torch, which sets ``persistent_id`` as an attribute (2.5) or in a subclass
    (later), and records the storages under their names in the archive."""

    noted: ClassVar[dict[str, torch.UntypedStorage]]
    persistent_id: Any

    def __init__(self, file: Any, protocol: int) -> None:
        self._file = file
        self._protocol = protocol

    def dump(self, obj: Any) -> None:
        _NotingPickler(self._file, self._protocol, self.persistent_id, self.noted).dump(obj)


class _NotingPickler(pickle.Pickler):
    def __init__(
        self, file: Any, protocol: int, identify: Any, noted: dict[str, torch.UntypedStorage]
    ) -> None:
        super().__init__(file, protocol)
        self._identify = identify
        self._noted = noted

    def persistent_id(self, obj: Any) -> Any:
        found = self._identify(obj)
        if found is not None:
            self._noted[f"data/{found[2]}"] = getattr(obj, "_untyped_storage", obj)
        return found


def _record_name(header: bytearray, start: int) -> str:
    """Return a record's name in the archive, without the archive's own name."""
    (length,) = struct.unpack_from("<H", header, start + _NAME_LENGTH_AT)
    name = header[start + _NAME_AT : start + _NAME_AT + length]
    return name.decode(errors="replace").partition("/")[2]


def _view(storage: Any) -> Any:
    """Return the bytes of a storage, without a copy if it is on the CPU."""
    flat = torch.empty(0, dtype=torch.uint8, device="cpu")
    return flat.set_(storage.cpu()).numpy()


Takes = Callable[[str, Any, int], bool]
"""Returns whether this rank writes a file, by path in the part, contents and tensor bytes."""


def _always(path: str, obj: Any, tensor_bytes: int) -> bool:
    return True


@contextmanager
def torch_save_through(directory: Path, part: Part, takes: Takes = _always) -> Iterator[None]:
    """Make every ``torch.save`` to a path below ``directory`` write through ``part``.

    ColossalAI names files and does not open them. A tensor is copied once, without the passes that
    ``torch.save`` makes over it. Calls with options, and objects that cannot be laid out ahead, are
    left to torch.

    Args:
        takes: called once for each file; if it returns false, nothing is written.
    """
    plain = torch.save
    root = os.path.abspath(directory)

    def save(obj: Any, f: Any, *args: Any, **options: Any) -> None:
        path = os.path.abspath(f) if isinstance(f, str | os.PathLike) else ""
        if not path.startswith(root + os.sep):
            plain(obj, f, *args, **options)
            return
        archive = None if args or options else plan_archive(obj)
        name = os.path.relpath(path, root)
        if not takes(name, obj, archive.tensor_bytes if archive else 0):
            return  # another rank writes it, and may have already
        if os.path.lexists(path):
            plain(obj, f, *args, **options)
            return
        with part.open(name, archive.size if archive else None) as file:
            if archive is not None:
                archive.write(file)
            else:
                stream: Any = file  # torch needs less than a complete file object
                plain(obj, stream, *args, **options)

    torch.save = save
    try:
        yield
    finally:
        torch.save = plain

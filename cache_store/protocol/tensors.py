"""Tensors kept once per cache: what all of its rows need in order to be read, such as the teacher's output head.

1. Before ``cache.json``, each is written as ``tensors/NAME-HASH.npy``, under a name that proves its bytes.
2. ``cache.json`` lists them. Of several runs that start a cache at once, one writes it; what the others wrote is orphaned.
3. ``Tensors`` reads one when it is asked for. The head of an object has to be, to the byte, what is written for the dtype and
   shape in ``cache.json``: nothing that a file says of itself is believed, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.protocol.commit import put
from alignkd.cache_store.storage.contract import TEMPORARY, Storage

FOLDER = "tensors"
DTYPES = ("|u1", "|i1", "<u2", "<i4", "<f2", "<f4")
"""What a tensor may be; the bits of bfloat16 are kept as ``<u2``."""

TensorSource = Mapping[str, Array] | Callable[[], Mapping[str, Array]]

_NAME = re.compile(r"[a-z][a-z0-9_.]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OBJECT = re.compile(rf"{FOLDER}/{_NAME.pattern}-([0-9a-f]{{12}})\.npy")
_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNED = 64
_MAX_DIMS = 8


class DamagedTensorError(ValueError):
    """A tensor whose object is missing, or not what the manifest says."""


class MissingTensorError(KeyError, ValueError):
    """A name that no tensor of the cache has; the message says which there are."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes.
        return str(self.args[0])


@dataclass(frozen=True)
class TensorEntry:
    """What ``cache.json`` says of a tensor; ``bytes`` and ``sha256`` are those of its object, header included.

    ValueError for what no tensor can be.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        _require_kept(self.name, self.dtype, self.shape)
        if self.bytes != len(_header(self.dtype, self.shape)) + math.prod(self.shape) * np.dtype(self.dtype).itemsize:
            raise ValueError(f"tensor {self.name!r}: {self.bytes} bytes are not those of {self.dtype} {list(self.shape)}")
        if not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"tensor {self.name!r}: found sha256 {self.sha256!r}, expected 64 hex characters")

    @property
    def object(self) -> str:
        """Name of its object, relative to the cache."""
        return f"{FOLDER}/{self.name}-{self.sha256[:12]}.npy"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it, under its name."""
        return {"dtype": self.dtype, "shape": list(self.shape), "bytes": self.bytes, "sha256": self.sha256}


class Tensors(Mapping[str, Array]):
    """The tensors of a cache by name, read-only arrays.

    Each is read, and compared with its sha256, whenever it is asked for: they may be large, so that whoever needs one
    twice holds on to it. MissingTensorError (a ValueError) for other names, DamagedTensorError where the object is not what the
    manifest says.
    """

    def __init__(self, storage: Storage, entries: Mapping[str, TensorEntry]) -> None:
        self.storage, self.entries = storage, entries

    def __getitem__(self, name: str) -> Array:
        if name not in self.entries:
            there = ", ".join(self.entries) or "none"
            raise MissingTensorError(f"the cache at {self.storage.url} keeps no tensor {name!r}, it keeps: {there}")
        return read_tensor(self.storage, self.entries[name])

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def write_tensors(storage: Storage, tensors: Mapping[str, Array]) -> dict[str, TensorEntry]:
    """Write each tensor as an object of its own, one at a time; ValueError for a name or dtype that is not kept."""
    return {name: _write(storage, name, tensors[name]) for name in sorted(tensors)}


def read_tensor(storage: Storage, entry: TensorEntry) -> Array:
    """A read-only array over the bytes of its object; DamagedTensorError, before it is read where its size tells already."""
    check_size(storage, entry)
    data, header = storage.read(entry.object), _header(entry.dtype, entry.shape)
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _damaged(storage, entry, "its sha256 is not the one in cache.json")
    if data[: len(header)] != header:
        raise _damaged(storage, entry, f"its header is not that of {entry.dtype} {list(entry.shape)}")
    values: Array = np.frombuffer(memoryview(data)[len(header) :], entry.dtype)
    return values.reshape(entry.shape)


def check_size(storage: Storage, entry: TensorEntry) -> None:
    """DamagedTensor where its object is missing, or of another size."""
    found = storage.size(entry.object)
    if found != entry.bytes:
        raise _damaged(
            storage, entry, f"found {'nothing' if found is None else f'{found} bytes'}, expected {entry.bytes} bytes"
        )


def unlisted(storage: Storage, entries: Mapping[str, TensorEntry]) -> list[str]:
    """What lies among the tensors without being one of the cache's, temporaries aside."""
    listed = {entry.object for entry in entries.values()}
    names = [f"{FOLDER}/{name}" for name in storage.names(FOLDER) if not name.startswith(TEMPORARY)]
    return [name for name in names if name not in listed]


def is_orphan(storage: Storage, name: str) -> bool:
    """Whether an unlisted object is a tensor that another run wrote: its name proves its bytes."""
    match = _OBJECT.fullmatch(name)
    try:
        return match is not None and hashlib.sha256(storage.read(name)).hexdigest()[:12] == match[1]
    except FileNotFoundError:  # a folder
        return False


def sweep_orphans(storage: Storage, entries: Mapping[str, TensorEntry], *, min_age_s: float) -> list[str]:
    """Remove tensors that runs left which were too late to write the manifest, or crashed before; returns their names."""
    names = [name for name in unlisted(storage, entries) if _OBJECT.fullmatch(name)]
    old = [name for name in names if not min_age_s or storage.age_s(name) >= min_age_s]
    for name in old:
        storage.delete(name)
    return old


def _write(storage: Storage, name: str, array: Array) -> TensorEntry:
    # Little-endian, one value after the other; no copy where it is so already.
    stored = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    dtype, shape = stored.dtype.str, stored.shape
    _require_kept(name, dtype, shape)
    header, values = _header(dtype, shape), stored.reshape(-1).view(np.uint8).data
    digest = hashlib.sha256(header)
    digest.update(values)
    entry = TensorEntry(name, dtype, shape, len(header) + len(values), digest.hexdigest())
    put(storage, entry.object, b"".join((header, values)))
    return entry


def _require_kept(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """ValueError for a name, dtype or shape that no tensor of a cache has."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"tensor {name!r}: expected lower-case letters, digits, _ and ., a letter first")
    if dtype not in DTYPES:
        raise ValueError(f"tensor {name!r}: found dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    if len(shape) > _MAX_DIMS or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
        raise ValueError(f"tensor {name!r}: found shape {shape!r}, expected up to {_MAX_DIMS} sizes")


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file (version 1.0), spelt here and not by numpy, so that it does not change with its version."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(_MAGIC) + 2 + len(text) + 1) % _ALIGNED) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text


def _damaged(storage: Storage, entry: TensorEntry, why: str) -> DamagedTensorError:
    return DamagedTensorError(
        f"tensor {entry.name!r} of the cache at {storage.url} cannot be used: {entry.object}: {why}. It cannot be rebuilt from"
        " the rest: restore it from a copy, or write a new cache"
    )

"""Tensors stored once per cache, because every row needs them to be read: the teacher's output head, for example.

1. Before ``cache.json``, each tensor is written as ``tensors/NAME-HASH.npy``, with the hash of its bytes in the name.
2. ``cache.json`` lists them. If several runs start a cache at once, one of them writes it; the others' tensors are orphans.
3. ``Tensors`` reads a tensor when it is asked for. Nothing that a file says about itself is believed: its header must be byte
   for byte what follows from the dtype and shape in ``cache.json``, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.errors import DamagedTensorError, MissingTensorError, UnusableObjectError
from alignkd.cache_store.limits import max_decoded_bytes, raise_limit_hint
from alignkd.cache_store.protocol.commit import older_than, put
from alignkd.cache_store.protocol.names import TENSORS, our_names
from alignkd.cache_store.storage import Storage
from alignkd.errors import CacheError

_log = logging.getLogger(__name__)

DTYPES = ("|u1", "|i1", "<u2", "<i4", "<f2", "<f4")
"""The dtypes of tensors; the bits of bfloat16 are stored as ``<u2``."""

TensorSource = Mapping[str, Array] | Callable[[], Mapping[str, Array]]

_NAME = re.compile(r"[a-z][a-z0-9_.]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OBJECT = re.compile(rf"{TENSORS}/{_NAME.pattern}-([0-9a-f]{{12}})\.npy")
_MAGIC = b"\x93NUMPY\x01\x00"
_ALIGNED = 64
_MAX_DIMS, _MAX_ELEMENTS = 8, 1 << 48


@dataclass(frozen=True)
class TensorEntry:
    """What ``cache.json`` says about a tensor; ``bytes`` and ``sha256`` are those of its object, header included.

    Raises:
        CacheError: no tensor can have such an entry.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        _require_storable(self.name, self.dtype, self.shape)
        if self.bytes != len(_header(self.dtype, self.shape)) + math.prod(self.shape) * np.dtype(self.dtype).itemsize:
            raise CacheError(f"tensor {self.name!r}: {self.bytes} bytes are not those of {self.dtype} {list(self.shape)}")
        if not _SHA256.fullmatch(self.sha256):
            raise CacheError(f"tensor {self.name!r}: found sha256 {self.sha256!r}, expected 64 hex characters")

    @property
    def object(self) -> str:
        """Name of its object, relative to the cache."""
        return f"{TENSORS}/{self.name}-{self.sha256[:12]}.npy"

    def to_dict(self) -> dict[str, Any]:
        """The entry for JSON; its name is the key."""
        return {"dtype": self.dtype, "shape": list(self.shape), "bytes": self.bytes, "sha256": self.sha256}


class Tensors(Mapping[str, Array]):
    """The tensors of a cache, by name: read-only arrays.

    A tensor is read and verified at every access, and not cached, since it may be large: keep it if you need it twice.

    Raises:
        MissingTensorError: the cache has no tensor of this name.
        DamagedTensorError: the tensor's object does not match the manifest.
    """

    def __init__(self, storage: Storage, entries: Mapping[str, TensorEntry]) -> None:
        self.storage, self.entries = storage, entries

    def __getitem__(self, name: str) -> Array:
        if name not in self.entries:
            existing = ", ".join(self.entries) or "none"
            raise MissingTensorError(f"the cache at {self.storage.url} has no tensor {name!r}, it has: {existing}")
        return read_tensor(self.storage, self.entries[name])

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def write_tensors(storage: Storage, tensors: Mapping[str, Array]) -> dict[str, TensorEntry]:
    """Write each tensor as one object, one after the other.

    Raises:
        CacheError: a name, dtype or shape that a tensor cannot have.
    """
    return {name: _write(storage, name, tensors[name]) for name in sorted(tensors)}


def read_tensor(storage: Storage, entry: TensorEntry) -> Array:
    """A tensor as a read-only array over the bytes of its object.

    Raises:
        DamagedTensorError: the object is missing, or does not match ``entry``. A wrong size is found before reading.
    """
    check_size(storage, entry)
    if entry.bytes > (limit := max_decoded_bytes()):
        raise CacheError(
            f"tensor {entry.name!r} of the cache at {storage.url} has {entry.bytes} bytes, at most {limit} are read:"
            f" {raise_limit_hint(entry.bytes)}"
        )
    try:
        data, header = storage.read(entry.object, entry.bytes), _header(entry.dtype, entry.shape)
    except (FileNotFoundError, UnusableObjectError) as error:
        raise _damaged(storage, entry, str(error)) from error
    if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise _damaged(storage, entry, "its sha256 is not the one in cache.json")
    if data[: len(header)] != header:
        raise _damaged(storage, entry, f"its header is not that of {entry.dtype} {list(entry.shape)}")
    values: Array = np.frombuffer(memoryview(data)[len(header) :], entry.dtype)
    return values.reshape(entry.shape)


def check_size(storage: Storage, entry: TensorEntry) -> None:
    """DamagedTensorError if the tensor's object is missing or has another size."""
    found = storage.size(entry.object)
    if found != entry.bytes:
        raise _damaged(
            storage, entry, f"found {'nothing' if found is None else f'{found} bytes'}, expected {entry.bytes} bytes"
        )


def unlisted(storage: Storage, entries: Mapping[str, TensorEntry]) -> list[str]:
    """What has the name of a tensor but is not in the manifest."""
    listed = {entry.object for entry in entries.values()}
    return [name for name in our_names(storage, TENSORS) if name not in listed]


def is_orphan(storage: Storage, name: str) -> bool:
    """Whether an unlisted object is a tensor of another run: then the hash in its name is that of its bytes."""
    match = _OBJECT.fullmatch(name)
    try:
        return match is not None and hashlib.sha256(storage.read(name, max_decoded_bytes())).hexdigest()[:12] == match[1]
    except (FileNotFoundError, UnusableObjectError):  # a folder, or something else that is no file
        return False


def sweep_orphans(storage: Storage, entries: Mapping[str, TensorEntry], *, min_age_s: float) -> list[str]:
    """Remove tensors of runs that crashed, or that another run was faster than; returns their names."""
    old = older_than(storage, unlisted(storage, entries), min_age_s)
    for name in old:
        storage.delete(name)
        _log.info("swept %s: the manifest does not list it", name)
    return old


def _write(storage: Storage, name: str, array: Array) -> TensorEntry:
    # Little-endian and contiguous; no copy if it is so already.
    stored = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
    dtype, shape = stored.dtype.str, stored.shape
    _require_storable(name, dtype, shape)
    header, values = _header(dtype, shape), stored.reshape(-1).view(np.uint8).data
    digest = hashlib.sha256(header)
    digest.update(values)
    entry = TensorEntry(name, dtype, shape, len(header) + len(values), digest.hexdigest())
    put(storage, entry.object, b"".join((header, values)))
    return entry


def _require_storable(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    """CacheError for a name, dtype or shape that a tensor cannot have."""
    if not _NAME.fullmatch(name):
        raise CacheError(f"tensor {name!r}: expected lower-case letters, digits, _ and ., beginning with a letter")
    if dtype not in DTYPES:
        raise CacheError(f"tensor {name!r}: found dtype {dtype!r}, expected one of {', '.join(DTYPES)}")
    sizes = all(type(size) is int and size >= 0 for size in shape)
    if len(shape) > _MAX_DIMS or not sizes or math.prod(max(size, 1) for size in shape) >= _MAX_ELEMENTS:
        raise CacheError(f"tensor {name!r}: found shape {shape!r}, expected up to {_MAX_DIMS} sizes")


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file (version 1.0). Written here and not by numpy, so that it does not change with its version."""
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(_MAGIC) + 2 + len(text) + 1) % _ALIGNED) + b"\n"
    return _MAGIC + len(text).to_bytes(2, "little") + text


def _damaged(storage: Storage, entry: TensorEntry, why: str) -> DamagedTensorError:
    return DamagedTensorError(
        f"tensor {entry.name!r} of the cache at {storage.url} cannot be used: {entry.object}: {why}. It cannot be rebuilt from"
        " the rest: restore it from a copy, or write a new cache"
    )

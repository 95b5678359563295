"""The few calls into zarr, the same for zarr-python 2.18 (the newest on Python 3.10) and 3.

Both write and read Zarr format 2 here. A group lives in a ``dict`` from file name to bytes, never in a folder: the
caller decides where the bytes go, and what it verified is what gets read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from numcodecs import Blosc, blosc

from alignkd.cache_store.codecs import Array

ZARR_3 = int(zarr.__version__.partition(".")[0]) >= 3

CHUNK_BYTES = 16 << 20

# Blosc's threads write their blocks in the order in which they finish, so equal arrays would give different bytes;
# nor do they survive a fork. zarr 3 turns them off as well.
blosc.use_threads = False


def write_group(arrays: Mapping[str, Array]) -> dict[str, bytes]:
    """The files of a group of 1-D arrays, compressed with Blosc (Zstd, bytes shuffled), metadata included."""
    files: dict[str, Any] = {}
    store = _memory_store(files)
    zarr.open_group(store, mode="w", **_format())
    for name, array in arrays.items():
        assert array.ndim == 1
        created: Any = zarr.create(
            array.shape,
            chunks=(min(max(array.size, 1), CHUNK_BYTES // array.itemsize),),
            dtype=array.dtype,
            compressor=Blosc(cname="zstd", clevel=3, shuffle=Blosc.SHUFFLE),
            filters=None,
            fill_value=0,
            order="C",
            store=store,
            path=name,
            # A chunk that is missing is then a chunk that was lost.
            **(_format(config={"write_empty_chunks": True}) if ZARR_3 else {"write_empty_chunks": True}),
        )
        created[...] = array
    # zarr 3 adds empty attributes to everything; zarr 2 does not.
    return {name: _to_bytes(value) for name, value in files.items() if not name.endswith(".zattrs")}


def read_array(files: Mapping[str, bytes], name: str) -> Array:
    """The array ``name`` of a group; the caller has checked its metadata (``zarr_shard``)."""
    store = _memory_store({path: _from_bytes(data) for path, data in files.items()})
    array: Any = zarr.open_array(store, mode="r", path=name, **_format())
    return np.asarray(array[...])


def _format(**more: Any) -> dict[str, Any]:
    return {"zarr_format": 2, **more} if ZARR_3 else {}


def _memory_store(files: dict[str, Any]) -> Any:
    return zarr.storage.MemoryStore(files) if ZARR_3 else files


def _from_bytes(data: bytes) -> Any:
    if not ZARR_3:
        return data
    from zarr.core.buffer.cpu import Buffer

    return Buffer.from_bytes(data)


def _to_bytes(value: Any) -> bytes:
    return bytes(value.to_bytes() if ZARR_3 else value)

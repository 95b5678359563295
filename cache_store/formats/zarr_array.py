"""One array <-> a Zarr array (format 3) that is one Zarr shard: its metadata and its bytes.

zarr is imported when an array is written, not before: reading does not need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import Array, Shape
from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats.encoding import CLEVEL, CNAME, check_frame, decompress_into, dump_json

CHUNK_BYTES = 4 << 20

_INDEX_ENTRY_BYTES, _CRC_BYTES = 16, 4


def group_json(attributes: Mapping[str, Any]) -> bytes:
    """Metadata of a group."""
    return dump_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def array_json(shape: Shape, dtype: np.dtype[Any]) -> bytes:
    """Metadata of an array. Written here and not by zarr, so that they do not change with zarr's version."""
    chunk, outer = _chunks(shape, dtype)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    compression = {"cname": CNAME, "clevel": CLEVEL, "shuffle": "shuffle", "typesize": dtype.itemsize, "blocksize": 0}
    sharding = {
        "chunk_shape": chunk,
        "codecs": [little if dtype.itemsize > 1 else {"name": "bytes"}, {"name": "blosc", "configuration": compression}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return dump_json(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": shape,
            "data_type": dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0 if dtype.kind == "f" else 0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
        }
    )


def shard_name(shape: Shape) -> str:
    """Name of an array's one shard, relative to the array. An array without elements has no shard."""
    return "/".join(("c", *("0" for _ in shape)))


def decoded_bytes(shape: Shape, dtype: np.dtype[Any]) -> int:
    """Bytes of an array's chunks after decompression."""
    _, outer = _chunks(shape, dtype)
    return math.prod(outer) * dtype.itemsize


def encode(values: Array) -> bytes:
    """The bytes of an array's shard."""
    import zarr
    from zarr.codecs import BloscCodec

    chunk, outer = _chunks(values.shape, values.dtype)
    files: dict[str, Any] = {}
    array = zarr.create_array(
        zarr.storage.MemoryStore(files),
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunk,
        shards=outer,
        compressors=BloscCodec(cname=CNAME, clevel=CLEVEL, shuffle="shuffle", typesize=values.dtype.itemsize),
        fill_value=0,
        # So a missing chunk is always a lost chunk.
        config={"write_empty_chunks": True},
    )
    array[...] = values
    return bytes(files[shard_name(values.shape)].to_bytes())


def decode(data: bytes, shape: Shape, dtype: np.dtype[Any]) -> Array:
    """The array in the bytes of its shard.

    Frames are decompressed here and not by zarr: its stores are asynchronous, and a shard of many small arrays would take
    twice as long to open.

    Raises:
        CorruptShardError: the bytes do not have the layout of this array (checked before decompressing), or are damaged.
    """
    chunk, outer = _chunks(shape, dtype)
    nbytes = math.prod(chunk) * dtype.itemsize
    values = np.empty(outer, dtype)
    targets = values.reshape(-1).view(np.uint8).reshape(-1, nbytes)
    for frame, target in zip(_frames(data, outer[0] // chunk[0], nbytes), targets, strict=True):
        decompress_into(frame, target)
    return values[: shape[0]]


def _chunks(shape: Shape, dtype: np.dtype[Any]) -> tuple[Shape, Shape]:
    """Shape of a chunk and of the shard: as few chunks as possible, of equal size, cut along the first axis."""
    # Zarr has no chunks of size zero.
    rows, *others = (max(size, 1) for size in shape)
    row_bytes = math.prod(others) * dtype.itemsize
    length = -(-rows // -(-rows * row_bytes // CHUNK_BYTES))
    return (length, *others), (-(-rows // length) * length, *others)


def _frames(data: bytes, count: int, nbytes: int) -> list[memoryview]:
    """The Blosc frames of all chunks.

    Raises:
        CorruptShardError: ``data`` is not exactly these frames in order, followed by an index that says so.
    """
    index_at = len(data) - count * _INDEX_ENTRY_BYTES - _CRC_BYTES
    if index_at < 0:
        raise CorruptShardError(f"found {len(data)} bytes for {count} chunks and their index")
    at, frames = 0, []
    for offset, size in np.frombuffer(data, "<u8", 2 * count, index_at).reshape(count, 2).tolist():
        if offset != at or at + size > index_at:
            raise CorruptShardError(f"found a chunk of {size} bytes at {offset}, expected one at {at} that ends by {index_at}")
        frames.append(memoryview(data)[at : at + size])
        check_frame(frames[-1], nbytes)
        at += size
    if at != index_at:
        raise CorruptShardError(f"found chunks of {at} bytes, expected {index_at}")
    return frames

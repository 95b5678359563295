"""What the shard formats have in common: how JSON is spelt, how a field is described, how an array is squeezed.

Arrays are squeezed into Blosc frames. Blosc allocates and reads what the header of a frame says, so a header is compared
with what is known otherwise before Blosc sees the frame.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import numpy as np
from numcodecs import Blosc, blosc
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.rows.shard import MAX_SHARD_BYTES, CorruptShardError
from alignkd.cache_store.rows.spec import FieldSpec

# Blosc's threads write their blocks in the order in which they finish, so equal arrays would give different bytes;
# nor do they survive a fork. zarr turns them off as well.
blosc.use_threads = False

CNAME: Final = "zstd"
CLEVEL: Final = 3

_BLOSC = Blosc(cname=CNAME, clevel=CLEVEL, shuffle=Blosc.SHUFFLE)
# Version, (version of the compressor), flags, (item size), bytes, (block size), compressed bytes.
_HEADER = struct.Struct("<BxBxI4xI")
_FORMAT_VERSION = 2
_ZSTD = 4


def dump_json(content: Any) -> bytes:
    """The one spelling of ``content``, so that equal contents are equal bytes and the other way round."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def describe(field: FieldSpec) -> dict[str, Any]:
    """What a reader without the cache's spec needs to know of a field."""
    return {"dims": list(field.dims), "dtype": field.dtype, "codec": field.codec, "per_image": field.per_image}


def check_shapes(field: FieldSpec, shapes: NDArray[np.int32]) -> None:
    """CorruptShard for shapes that no array has: with a negative size, or too large even for numpy's empty arrays."""
    if (shapes < 0).any():
        raise CorruptShardError(f"field {field.name!r} has a negative size")
    if np.maximum(shapes, 1).prod(axis=1, dtype=np.float64).max(initial=0) > MAX_SHARD_BYTES:
        raise CorruptShardError(f"field {field.name!r} has a shape of more than {MAX_SHARD_BYTES} values")


def check_budget(nbytes: int) -> None:
    """CorruptShard where the arrays of a shard claim to hold more than any shard does."""
    if nbytes > MAX_SHARD_BYTES:
        raise CorruptShardError(f"the shard claims {nbytes} bytes of arrays, at most {MAX_SHARD_BYTES} are read")


def compress(values: Array) -> bytes:
    """One Blosc frame; nothing at all for no values, of which Blosc has no frame that it reads back."""
    return bytes(_BLOSC.encode(np.ascontiguousarray(values))) if values.size else b""


def decompress(frame: bytes | memoryview, nbytes: int) -> bytes:
    """The ``nbytes`` bytes in a frame of ``compress``; CorruptShardError where it does not hold just these."""
    if nbytes == 0 and len(frame) == 0:
        return b""
    check_frame(frame, nbytes)
    try:
        return bytes(blosc.decompress(frame))
    except RuntimeError as error:
        raise CorruptShardError(f"a Blosc frame cannot be decompressed: {error}") from error


def decompress_into(frame: bytes | memoryview, place: Array) -> None:
    """Decompress a frame that ``check_frame`` found right into ``place``, which is as long; CorruptShardError where it
    breaks."""
    try:
        blosc.decompress(frame, place)
    except RuntimeError as error:
        raise CorruptShardError(f"a Blosc frame cannot be decompressed: {error}") from error


def check_frame(frame: bytes | memoryview, nbytes: int) -> None:
    """CorruptShard unless the header of a Blosc frame declares ``nbytes`` bytes, zstd and the frame's own length."""
    if len(frame) < _HEADER.size:
        raise CorruptShardError(f"found {len(frame)} bytes for a Blosc frame, expected at least {_HEADER.size}")
    version, flags, uncompressed, compressed = _HEADER.unpack_from(frame)
    found, expected = (version, flags >> 5, uncompressed, compressed), (_FORMAT_VERSION, _ZSTD, nbytes, len(frame))
    if found != expected:
        raise CorruptShardError(f"a Blosc frame declares version, compressor, bytes and length {found}, expected {expected}")

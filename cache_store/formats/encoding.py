"""What the shard formats share: canonical JSON, checks of ids, shapes and sizes, and Blosc compression.

Blosc allocates and reads what the header of a frame says. So a header is compared with the expected size before Blosc gets
the frame.
"""

from __future__ import annotations

import json
import struct
from typing import Any, Final

import numpy as np
from numcodecs import Blosc, blosc
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.limits import max_decoded_bytes, raise_limit_hint
from alignkd.cache_store.rows.row import RowId, is_key
from alignkd.cache_store.rows.spec import FieldSpec

# Blosc's threads write their blocks in the order in which they finish, so equal arrays would give different bytes. The
# threads do not survive a fork either. zarr turns them off as well.
blosc.use_threads = False

CNAME: Final = "zstd"
CLEVEL: Final = 3

_BLOSC = Blosc(cname=CNAME, clevel=CLEVEL, shuffle=Blosc.SHUFFLE)
# Version, (version of the compressor), flags, (item size), bytes, (block size), compressed bytes.
_HEADER = struct.Struct("<BxBxI4xI")
_FORMAT_VERSION = 2
_ZSTD = 4


def dump_json(content: Any) -> bytes:
    """Canonical JSON: equal contents are equal bytes, and the other way round."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def field_metadata(field: FieldSpec) -> dict[str, Any]:
    """What a reader without the cache's manifest needs to know about a field."""
    return {"dims": list(field.dims), "dtype": field.dtype, "codec": field.codec, "per_image": field.per_image}


def check_ids(entries: Any) -> tuple[RowId, ...]:
    """The row ids in a shard's own index.

    Raises:
        CorruptShardError: it is not a list of keys, sample ids and image hashes, or a key occurs twice.
    """
    try:
        ids = tuple(RowId(*entry) for entry in entries)
    except TypeError as error:
        raise CorruptShardError(f"the index is not a list of rows: {error}") from error
    if not all(is_key(row.key) and isinstance(row.sample_id, str) and isinstance(row.image_sha256, str) for row in ids):
        raise CorruptShardError("the index has something other than keys, sample ids and image hashes")
    if len({row.key for row in ids}) < len(ids):
        raise CorruptShardError("the index has a key twice")
    return ids


def check_shapes(field: FieldSpec, shapes: NDArray[np.int32]) -> None:
    """CorruptShardError for impossible shapes: a negative size, or too large even for numpy's empty arrays."""
    if (shapes < 0).any():
        raise CorruptShardError(f"field {field.name!r} has a negative size")
    values = float(np.maximum(shapes, 1).prod(axis=1, dtype=np.float64).max(initial=0))
    if values > (limit := max_decoded_bytes()):
        raise CorruptShardError(
            f"field {field.name!r} has a shape of {values:.0f} values, at most {limit} are read:"
            f" {raise_limit_hint(int(values))}"
        )


def check_budget(nbytes: int) -> None:
    """CorruptShardError if the arrays of a shard claim more bytes than any shard has."""
    if nbytes > (limit := max_decoded_bytes()):
        raise CorruptShardError(
            f"the shard claims {nbytes} bytes of arrays, at most {limit} are read: {raise_limit_hint(nbytes)}"
        )


def compress(values: Array) -> bytes:
    """One Blosc frame; no bytes for no values, since Blosc cannot read back an empty frame."""
    return bytes(_BLOSC.encode(np.ascontiguousarray(values))) if values.size else b""


def decompress(frame: bytes | memoryview, nbytes: int) -> bytes:
    """The ``nbytes`` bytes in a frame of :func:`compress`.

    Raises:
        CorruptShardError: the frame does not hold exactly that.
    """
    if nbytes == 0 and len(frame) == 0:
        return b""
    check_frame(frame, nbytes)
    try:
        return bytes(blosc.decompress(frame))
    except (RuntimeError, ValueError) as error:
        raise CorruptShardError(f"a Blosc frame cannot be decompressed: {error}") from error


def decompress_into(frame: bytes | memoryview, target: Array) -> None:
    """Decompress a frame that passed :func:`check_frame` into ``target``, which has as many bytes.

    Raises:
        CorruptShardError: the frame is damaged.
    """
    try:
        blosc.decompress(frame, target)
    except (RuntimeError, ValueError) as error:
        raise CorruptShardError(f"a Blosc frame cannot be decompressed: {error}") from error


def check_frame(frame: bytes | memoryview, nbytes: int) -> None:
    """CorruptShardError unless the header of a Blosc frame declares ``nbytes`` bytes, zstd and the frame's own length."""
    if len(frame) < _HEADER.size:
        raise CorruptShardError(f"found {len(frame)} bytes for a Blosc frame, expected at least {_HEADER.size}")
    version, flags, uncompressed, compressed = _HEADER.unpack_from(frame)
    found, expected = (version, flags >> 5, uncompressed, compressed), (_FORMAT_VERSION, _ZSTD, nbytes, len(frame))
    if found != expected:
        raise CorruptShardError(f"a Blosc frame declares version, compressor, bytes and length {found}, expected {expected}")

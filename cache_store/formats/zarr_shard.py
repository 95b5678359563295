"""One shard as one object: a Zarr group (format 3) in a zip archive of uncompressed members.

One object is one rename on a file system and one PUT on an object store. It is read whole, then verified, then decoded:

    _index                uint8 [bytes]         JSON [[key, sample_id, image_sha256], ...]
    FIELD/                attributes: dims, dtype (decoded), codec, per_image
    FIELD/value_of_row    int32 [rows]          per-image fields only: the value that each row has; else row i has value i
    FIELD/shape           int32 [values, ndim]  decoded shape of each value
    FIELD/PART            [elements]            one part of the codec; the values follow each other
    FIELD/PART_offsets    int64 [values + 1]    value j is PART[PART_offsets[j] : PART_offsets[j + 1]], flat

Rows with the same non-empty image_sha256 share one value of a per-image field; values are numbered as they first occur.

A shard may come from a stranger. Nothing is unpickled or extracted. Metadata must be byte for byte what this module writes,
the members must be exactly the expected ones, and sizes are compared before anything is decompressed.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array, Shape
from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats.encoding import check_budget, check_ids, check_shapes, dump_json, field_metadata
from alignkd.cache_store.formats.zarr_array import (
    array_json,
    decode,
    decoded_bytes,
    encode,
    group_json,
    shard_name,
)
from alignkd.cache_store.limits import load_json
from alignkd.cache_store.rows.encode import to_column_shard
from alignkd.cache_store.rows.layout import empty_layout, first_rows, part_offsets, values_of_rows
from alignkd.cache_store.rows.row import RowId
from alignkd.cache_store.rows.shard import ColumnShard, Shard
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.errors import wrap_errors

NAME = "zarr"
SUFFIX = ".zarr.zip"

# The names of fields begin with a letter.
_INDEX = "_index"
_BYTE, _SIZE, _OFFSET = np.dtype("u1"), np.dtype("<i4"), np.dtype("<i8")


def write_shard(shard: Shard) -> bytes:
    """The bytes of a shard: the same rows give the same bytes, with the same zarr and numcodecs."""
    files = {"zarr.json": group_json({})}
    for field in shard.spec.fields:
        files[f"{field.name}/zarr.json"] = group_json(field_metadata(field))
    for name, values in _arrays(to_column_shard(shard.spec, shard)):
        files[f"{name}/zarr.json"] = array_json(values.shape, values.dtype)
        if values.size:
            files[f"{name}/{shard_name(values.shape)}"] = encode(values)
    return _zip(files)


def read_shard(spec: CacheSpec, data: bytes) -> Shard:
    """The shard in ``data``.

    Raises:
        CorruptShardError: ``data`` is not a shard, or does not match ``spec``.
    """
    # Bytes from a stranger may break zip, JSON, zarr and Blosc in any way.
    with wrap_errors(CorruptShardError, "not a readable shard"):
        return _read(spec, _Members(_unzip(data)))


def read_shapes(spec: CacheSpec, file: BinaryIO, rows: int, field: str) -> NDArray[np.int32]:
    """The decoded shape of ``field`` in each row, ``[rows, ndim]``: one small member of the archive.

    Raises:
        CorruptShardError: ``file`` is not a shard with so many rows.
    """
    (wanted,) = (known for known in spec.fields if known.name == field)
    assert not wanted.per_image
    shape = (rows, len(wanted.dims))
    if math.prod(shape) == 0:
        return np.empty(shape, np.int32)
    with wrap_errors(CorruptShardError, "not a readable shard"), zipfile.ZipFile(file) as archive:
        member = archive.getinfo(f"{field}/shape/{shard_name(shape)}")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > 2 * decoded_bytes(shape, _SIZE) + 4096:
            raise CorruptShardError(f"member {member.filename!r} declares {member.file_size} bytes for {rows} shapes")
        shapes = decode(archive.read(member), shape, _SIZE)
        check_shapes(wanted, shapes)
        return shapes


def audit(data: bytes, shard: Shard) -> None:
    """Nothing to do: ``read_shard`` has checked everything."""


def field_bytes(spec: CacheSpec, data: bytes) -> dict[str, int]:
    """Compressed bytes of each field in ``data``, metadata included."""
    sizes = {field.name: 0 for field in spec.fields}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            field, _, _ = member.filename.partition("/")
            if field in sizes:
                sizes[field] += member.file_size
    return sizes


def _arrays(shard: ColumnShard) -> Iterator[tuple[str, Array]]:
    yield _INDEX, np.frombuffer(dump_json(shard.ids), _BYTE)
    for field in shard.spec.fields:
        if field.per_image:
            yield f"{field.name}/value_of_row", np.array(shard.value_of_row[field.name], _SIZE)
        yield f"{field.name}/shape", shard.shapes[field.name].astype(_SIZE, copy=False)
        for part, values in shard.parts[field.name].items():
            yield f"{field.name}/{part}", values
            yield f"{field.name}/{part}_offsets", np.array(shard.offsets[field.name][part], _OFFSET)


def _read(spec: CacheSpec, members: _Members) -> ColumnShard:
    members.require("zarr.json", group_json({}))
    ids = check_ids(load_json(members.array(_INDEX, (members.length(_INDEX),), _BYTE).tobytes()))
    shapes, parts = {}, {}
    for field in spec.fields:
        members.require(f"{field.name}/zarr.json", group_json(field_metadata(field)))
        values = _read_values(members, field, ids)
        shapes[field.name] = members.array(f"{field.name}/shape", (values, len(field.dims)), _SIZE)
        parts[field.name] = _read_parts(members, field, shapes[field.name])
    members.refuse_rest()
    return ColumnShard(spec, ids, shapes, parts)


def _read_values(members: _Members, field: FieldSpec, ids: Sequence[RowId]) -> int:
    """Number of values of a field."""
    expected = values_of_rows(field, ids)
    if field.per_image:
        found = members.array(f"{field.name}/value_of_row", (len(ids),), _SIZE)
        if found.tolist() != expected:
            raise CorruptShardError(f"array '{field.name}/value_of_row' does not follow from the images of the rows")
    return len(first_rows(expected))


def _read_parts(members: _Members, field: FieldSpec, shapes: NDArray[np.int32]) -> dict[str, Array]:
    check_shapes(field, shapes)
    parts = {}
    for part, offsets in part_offsets(field, shapes).items():
        name = f"{field.name}/{part}"
        _, dtype = empty_layout(field)[part]
        parts[part] = members.array(name, (offsets[-1],), dtype)
        if members.array(f"{name}_offsets", (len(offsets),), _OFFSET).tolist() != offsets:
            raise CorruptShardError(f"array '{name}_offsets' does not follow from array '{field.name}/shape'")
    return parts


class _Members:
    """The files of a group, taken one by one; an array is decoded only after its metadata were checked."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.claimed = 0

    def take(self, name: str) -> bytes:
        """A file; CorruptShardError if it is missing."""
        if name not in self.files:
            raise CorruptShardError(f"member {name!r} is missing")
        return self.files.pop(name)

    def require(self, name: str, expected: bytes) -> None:
        """CorruptShardError unless a file is exactly ``expected``."""
        found = self.take(name)
        if found != expected:
            raise CorruptShardError(f"member {name!r}: found {_shorten(found)}, expected {_shorten(expected)}")

    def length(self, name: str) -> int:
        """The declared length of a 1-D array."""
        (length,) = load_json(self.files[f"{name}/zarr.json"])["shape"]
        if not isinstance(length, int) or length < 0:
            raise CorruptShardError(f"array {name!r} declares a length of {length!r}")
        return length

    def array(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """An array; CorruptShardError unless it has this shape and dtype, and the shard stays below the limit."""
        self.require(f"{name}/zarr.json", array_json(shape, dtype))
        if math.prod(shape) == 0:
            return np.empty(shape, dtype)
        self.claimed += decoded_bytes(shape, dtype)
        check_budget(self.claimed)
        data = self.take(f"{name}/{shard_name(shape)}")
        try:
            return decode(data, shape, dtype)
        except CorruptShardError as error:
            raise CorruptShardError(f"array {name!r}: {error}") from error

    def refuse_rest(self) -> None:
        """CorruptShardError if files are left that were not taken."""
        if self.files:
            raise CorruptShardError(f"{len(self.files)} unexpected members, first {min(self.files)!r}")


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A zip archive of ``files``, sorted by name, the same wherever and whenever it is written."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            member = zipfile.ZipInfo(name)
            member.create_system = 3
            member.external_attr = 0o644 << 16
            archive.writestr(member, files[name])
    return buffer.getvalue()


def _unzip(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        stored = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not stored or sum(member.file_size for member in members) > len(data):
            raise CorruptShardError("the archive declares more bytes than it has")
        if len({member.filename for member in members}) < len(members):
            raise CorruptShardError("the archive has a member twice")
        return {member.filename: archive.read(member) for member in members}


def _shorten(text: bytes) -> str:
    return repr(text if len(text) <= 200 else text[:200] + b"...")

"""One shard as one object: a Zarr group (format 3) in a zip archive whose members are stored as they are.

One object is one rename on a disk and one PUT on an object store, and is read whole, then verified, then decoded:

    _index                uint8 [bytes]       JSON [[key, sample_id, image_sha256], ...]
    FIELD/                attributes: dims, dtype (decoded), codec, per_image
    FIELD/value_of_row    int32 [rows]        of a per-image field only: which value a row has; else row i has value i
    FIELD/shape           int32 [values, ndim]  decoded shape of each value
    FIELD/PART            [elements]          a part of the codec, the values one after the other
    FIELD/PART_offsets    int64 [values + 1]  value j is PART[PART_offsets[j] : PART_offsets[j + 1]], flat

Rows with the same non-empty image_sha256 have one value of a per-image field; values are numbered as they first occur.

A shard may come from a stranger. Nothing is unpickled and nothing is extracted: metadata have to be byte for byte what this
module writes, the members have to be exactly the expected ones, and sizes are compared before anything is decompressed.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array, Shape
from alignkd.cache_store.formats.encoding import check_budget, check_shapes, describe, dump_json
from alignkd.cache_store.formats.zarr_array import (
    array_json,
    decode,
    decoded_bytes,
    encode,
    group_json,
    require_zarr_3,
    shard_name,
)
from alignkd.cache_store.rows.shard import (
    ColumnShard,
    CorruptShardError,
    RowId,
    Shard,
    check_ids,
    empty_layout,
    first_rows,
    join,
    part_offsets,
    values_of_rows,
)
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

NAME = "zarr"
SUFFIX = ".zarr.zip"

# The names of fields begin with a letter.
_INDEX = "_index"
_BYTE, _SIZE, _OFFSET = np.dtype("u1"), np.dtype("<i4"), np.dtype("<i8")


def write_shard(shard: Shard) -> bytes:
    """The bytes of a shard: the same rows give the same bytes, with the same zarr and numcodecs."""
    require_zarr_3()
    files = {"zarr.json": group_json({})}
    for field in shard.spec.fields:
        files[f"{field.name}/zarr.json"] = group_json(describe(field))
    for name, values in _arrays(join(shard.spec, shard)):
        files[f"{name}/zarr.json"] = array_json(values.shape, values.dtype)
        if values.size:
            files[f"{name}/{shard_name(values.shape)}"] = encode(values)
    return _zip(files)


def read_shard(spec: CacheSpec, data: bytes) -> Shard:
    """The shard in ``data``; CorruptShardError where it is none, or holds other than ``spec`` says."""
    require_zarr_3()
    try:
        return _read(spec, _Members(_unzip(data)))
    except CorruptShardError:
        raise
    except Exception as error:  # bytes from a stranger may break zip, JSON, zarr and Blosc in any way
        raise CorruptShardError(f"not a readable shard: {error!r}") from error


def audit(data: bytes, shard: Shard) -> None:
    """Nothing: ``read_shard`` has compared all there is."""


def field_bytes(spec: CacheSpec, data: bytes) -> dict[str, int]:
    """Bytes that each field takes in ``data``, compressed, metadata included."""
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
    ids = check_ids(json.loads(members.array(_INDEX, (members.length(_INDEX),), _BYTE).tobytes()))
    shapes, parts = {}, {}
    for field in spec.fields:
        members.require(f"{field.name}/zarr.json", group_json(describe(field)))
        values = _read_values(members, field, ids)
        shapes[field.name] = members.array(f"{field.name}/shape", (values, len(field.dims)), _SIZE)
        parts[field.name] = _read_parts(members, field, shapes[field.name])
    members.refuse_rest()
    return ColumnShard(spec, ids, shapes, parts)


def _read_values(members: _Members, field: FieldSpec, ids: Sequence[RowId]) -> int:
    """How many values a field has."""
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
    """The files of a group, taken one by one, an array only after what it declares was found right."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.claimed = 0

    def take(self, name: str) -> bytes:
        """A file; CorruptShardError where there is none."""
        if name not in self.files:
            raise CorruptShardError(f"member {name!r} is missing")
        return self.files.pop(name)

    def require(self, name: str, expected: bytes) -> None:
        """CorruptShard unless a file holds what is ``expected``."""
        found = self.take(name)
        if found != expected:
            raise CorruptShardError(f"member {name!r}: found {_shorten(found)}, expected {_shorten(expected)}")

    def length(self, name: str) -> int:
        """How long a 1-D array says it is."""
        (length,) = json.loads(self.files[f"{name}/zarr.json"])["shape"]
        if not isinstance(length, int) or length < 0:
            raise CorruptShardError(f"array {name!r} declares a length of {length!r}")
        return length

    def array(self, name: str, shape: Shape, dtype: np.dtype[Any]) -> Array:
        """An array; CorruptShardError unless it has this shape and dtype, and fits into what a shard may hold."""
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
        """CorruptShard if there are files that belong to nothing taken."""
        if self.files:
            raise CorruptShardError(f"{len(self.files)} unexpected members, first {min(self.files)!r}")


def _zip(files: Mapping[str, bytes]) -> bytes:
    """An archive of ``files`` by name, without anything that depends on when or where it was written."""
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
            raise CorruptShardError("the archive holds a member twice")
        return {member.filename: archive.read(member) for member in members}


def _shorten(text: bytes) -> str:
    return repr(text if len(text) <= 200 else text[:200] + b"...")

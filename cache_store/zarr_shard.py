"""One shard as one file: a Zarr group (format 2) in a zip archive, its members stored without further compression.

One file is one rename on a disk and one PUT on an object store, and is read whole, then verified, then decoded.
In the group, every array is 1-D, all rows one after the other:

    index                uint8    JSON [[key, sample_id, image_sha256], ...]
    FIELD.shape          int32    [rows * ndim], from which the offsets follow
    FIELD.PART           the codec's parts of the field

A shard may come from a stranger. Nothing is unpickled and nothing is extracted: metadata has to be what this module
writes, the members have to be exactly the expected ones, and sizes are compared before anything is decompressed.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.row import Row, is_key
from alignkd.cache_store.shard import (
    MAX_SHARD_BYTES,
    Column,
    CorruptShard,
    RowId,
    Shard,
    empty_layout,
    pack,
    part_sizes,
)
from alignkd.cache_store.spec import CacheSpec, FieldSpec
from alignkd.cache_store.zarr_compat import read_array, write_group

SUFFIX = ".zarr.zip"

_BYTE = np.dtype(np.uint8)
_SHAPE = np.dtype("<i4")
_BLOSC_HEADER = 16


def write_shard(spec: CacheSpec, rows: Sequence[Row]) -> bytes:
    """The bytes of a shard: the same rows give the same bytes, with the same zarr and numcodecs.

    ValueError that names the sample for values that fit neither spec nor codec.
    """
    shard = pack(spec, rows)
    index = json.dumps(shard.ids, separators=(",", ":")).encode()
    arrays: dict[str, Array] = {"index": np.frombuffer(index, _BYTE)}
    for field, column in shard.columns.items():
        arrays[f"{field}.shape"] = column.shapes.reshape(-1).astype(_SHAPE, copy=False)
        arrays.update({f"{field}.{part}": values for part, values in column.parts.items()})
    return _zip(write_group(arrays))


def read_shard(spec: CacheSpec, data: bytes) -> Shard:
    """The shard in ``data``; CorruptShard where it is none, or holds other than ``spec`` says."""
    try:
        members = _Members(_unzip(data))
        ids = _parse_index(members.take("index", _BYTE).tobytes())
        columns = {field.name: _read_column(members, field, len(ids)) for field in spec.fields}
        members.refuse_rest()
    except CorruptShard:
        raise
    except Exception as error:  # bytes from a stranger may break zip, JSON, zarr and Blosc in any way
        raise CorruptShard(f"not a readable shard: {error!r}") from error
    return Shard(spec, ids, columns)


def field_bytes(spec: CacheSpec, data: bytes) -> dict[str, int]:
    """Bytes that each field takes in ``data``, compressed, metadata included."""
    sizes = {field.name: 0 for field in spec.fields}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for member in archive.infolist():
            field, dot, _ = member.filename.partition(".")
            if dot and field in sizes:
                sizes[field] += member.file_size
    return sizes


class _Members:
    """The files of a group, taken array by array, each only after its declared size was found right."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.taken = {".zgroup"}
        self.budget = MAX_SHARD_BYTES

    def take(self, name: str, dtype: np.dtype[Any], size: int | None = None) -> Array:
        """The array ``name``; CorruptShard unless it declares ``dtype`` and, where given, ``size`` elements."""
        meta = self.files.get(f"{name}/.zarray")
        if meta is None:
            raise CorruptShard(f"array {name!r} is missing")
        found, chunk = _declared(name, json.loads(meta), dtype)
        if size is not None and found != size:
            raise CorruptShard(f"array {name!r} declares {found} elements, expected {size}")
        chunks = [f"{name}/{i}" for i in range(self._spend(name, found, chunk, dtype.itemsize))]
        for member in chunks:
            _check_chunk(member, self.files.get(member), chunk * dtype.itemsize)
        used = {member: self.files[member] for member in (f"{name}/.zarray", *chunks)}
        self.taken |= used.keys()
        return read_array(used, name)

    def refuse_rest(self) -> None:
        """CorruptShard if there are files that belong to no array taken."""
        rest = sorted(self.files.keys() - self.taken)
        if rest:
            raise CorruptShard(f"{len(rest)} unexpected members, first {rest[0]!r}")

    def _spend(self, name: str, size: int, chunk: int, itemsize: int) -> int:
        """Number of chunks, once what they decompress to fits into what this shard may still take."""
        count = -(-size // chunk)
        self.budget -= count * chunk * itemsize
        if self.budget < 0 or count > len(self.files):
            raise CorruptShard(f"array {name!r} declares {size} elements, more than this shard can hold")
        return count


def _declared(name: str, meta: Any, dtype: np.dtype[Any]) -> tuple[int, int]:
    """Size and chunk size of an array; CorruptShard unless the rest of its metadata is what ``write_shard`` writes."""
    expected = {"zarr_format": 2, "dtype": dtype.str, "order": "C", "filters": None, "fill_value": 0}
    differing = [key for key, value in expected.items() if meta.get(key, "missing") != value]
    if differing or meta["compressor"]["id"] != "blosc":
        raise CorruptShard(f"array {name!r} has unexpected metadata: {', '.join(differing) or 'compressor'}")
    (size,), (chunk,) = meta["shape"], meta["chunks"]
    if not (isinstance(size, int) and isinstance(chunk, int) and size >= 0 and chunk >= 1):
        raise CorruptShard(f"array {name!r} declares shape [{size}] in chunks of {chunk}")
    return size, chunk


def _check_chunk(member: str, data: bytes | None, nbytes: int) -> None:
    # Blosc allocates what bytes 4 to 8 of its header say.
    if data is None or len(data) < _BLOSC_HEADER or int.from_bytes(data[4:8], "little") != nbytes:
        raise CorruptShard(f"chunk {member!r} is missing or does not hold {nbytes} bytes")


def _read_column(members: _Members, field: FieldSpec, rows: int) -> Column:
    shapes = members.take(f"{field.name}.shape", _SHAPE, rows * len(field.dims)).reshape(rows, len(field.dims))
    if (shapes < 0).any():
        raise CorruptShard(f"field {field.name!r} has a negative size")
    sizes = part_sizes(field, shapes)
    parts = {
        part: members.take(f"{field.name}.{part}", dtype, sum(sizes[part])) for part, (_, dtype) in empty_layout(field).items()
    }
    return Column(shapes, parts)


def _parse_index(text: bytes) -> tuple[RowId, ...]:
    ids = tuple(RowId(*entry) for entry in json.loads(text))
    if not all(is_key(row.key) and isinstance(row.sample_id, str) and isinstance(row.image_sha256, str) for row in ids):
        raise CorruptShard("the index holds something other than keys, sample ids and image hashes")
    if len({row.key for row in ids}) < len(ids):
        raise CorruptShard("the index holds a key twice")
    return ids


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
            raise CorruptShard("the archive declares more bytes than it has")
        if len({member.filename for member in members}) < len(members):
            raise CorruptShard("the archive holds a member twice")
        return {member.filename: archive.read(member) for member in members}

"""One shard as one object: a tar archive as webdataset reads it, and an index for reading rows in any order.

    __index__               JSON: "ids" [[key, sample_id, image_sha256], ...], "size" of all that follows, and "fields": for
                            each dims, dtype (decoded), codec, per_image, "shapes" of the rows, and "parts": dtype and "places"
                            of the rows
    KEY.json                for each row: sample_id, image_sha256, and for each field shape, dims, dtype, codec, per_image and
                            dtypes of parts
    KEY.FIELD.PART.blosc    then its parts, fields by name: one Blosc frame each, nothing at all where there are no values

Rows with the same non-empty image_sha256 share the value of a per-image field: only the first has its members. The others
have the same places in the index, and in their KEY.json the field says "same_as": key of the first.

A place is [offset, size]; offsets count from where ``__index__`` and its padding end. webdataset skips that member.

A shard may come from a stranger. The index has to be byte for byte what this module writes for what the index says, places
have to lie in the archive, and a frame has to declare the size that shape and codec give before it is decompressed. Rows are
found by the index alone; that the members are what it says is for ``audit``.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.encoding import check_budget, check_shapes, compress, decompress, describe, dump_json
from alignkd.cache_store.shard import (
    CorruptShard,
    RowId,
    Shard,
    check_ids,
    empty_layout,
    first_rows,
    part_sizes,
    values_of_rows,
)
from alignkd.cache_store.spec import CacheSpec, FieldSpec

NAME = "webdataset"
SUFFIX = ".tar"

_INDEX = "__index__"

_Shapes = Mapping[str, NDArray[np.int32]]
# (field, part) -> [offset, size] of each value.
_Places = Mapping[tuple[str, str], list[list[int]]]


class _Column(NamedTuple):
    """Of one part in each value: how many elements, and where."""

    dtype: np.dtype[Any]
    sizes: list[int]
    places: list[list[int]]


class TarShard(Shard):
    """A shard whose frames lie in ``data``, their offsets counted from ``base``; each is decompressed when asked for."""

    def __init__(self, spec: CacheSpec, ids: Sequence[RowId], shapes: _Shapes, data: bytes, base: int, places: _Places) -> None:
        super().__init__(spec, ids, shapes)
        self.data = data
        self.base = base
        sizes = {field.name: part_sizes(field, shapes[field.name]) for field in spec.fields}
        self.columns = {
            (field, part): _Column(dtype, sizes[field][part], places[field, part]) for field, part, dtype in _parts(spec)
        }

    def part(self, field: str, part: str, i: int) -> Array:
        """Decompressed just now."""
        dtype, sizes, places = self.columns[field, part]
        value = self.value_of_row[field][i]
        offset, size = places[value]
        frame = self.data[self.base + offset : self.base + offset + size]
        try:
            return np.frombuffer(decompress(frame, sizes[value] * dtype.itemsize), dtype)
        except CorruptShard as error:
            raise CorruptShard(f"row {self.ids[i].key}, field {field!r}, {part}: {error}") from error


def write_shard(shard: Shard) -> bytes:
    """The bytes of a shard: the same rows give the same bytes, with the same numcodecs."""
    body = io.BytesIO()
    places: dict[tuple[str, str], list[list[int]]] = {(field, part): [] for field, part, _ in _parts(shard.spec)}
    for i, row in enumerate(shard.ids):
        _append(body, f"{row.key}.json", _row_json(shard, i))
        for field, part in _members_of(shard, i):
            frame = compress(shard.part(field, part, i))
            places[field, part].append([_append(body, f"{row.key}.{field}.{part}.blosc", frame), len(frame)])
    body.write(bytes(2 * tarfile.BLOCKSIZE))
    head = io.BytesIO()
    _append(head, _INDEX, _index_json(shard.spec, shard.ids, shard.shapes, places, body.tell()))
    return head.getvalue() + body.getvalue()


def read_shard(spec: CacheSpec, data: bytes) -> TarShard:
    """The shard in ``data``; CorruptShard where it is none, or holds other than ``spec`` says. Frames are not looked at."""
    try:
        base, text = _find_index(data)
        return _parse(spec, data, base, text)
    except CorruptShard:
        raise
    except Exception as error:  # bytes from a stranger may break tar and JSON in any way
        raise CorruptShard(f"not a readable shard: {error!r}") from error


def audit(data: bytes, shard: Shard) -> None:
    """CorruptShard unless a reader of tar finds what the index of ``shard``, read from ``data``, says."""
    assert isinstance(shard, TarShard)
    members = _members(data)
    names = [_INDEX, *(name for i in range(len(shard)) for name in _names(shard, i))]
    if [member.name for member in members] != names:
        raise CorruptShard(f"the archive has {len(members)} members, expected just the {len(names)} that the index names")
    found = iter(members[1:])
    for i, key in enumerate(shard.keys):
        at, size = _place(next(found))
        if data[at : at + size] != _row_json(shard, i):
            raise CorruptShard(f"row {key}: {key}.json is not what the index says")
        for field, part in _members_of(shard, i):
            at, size = _place(next(found))
            if [at - shard.base, size] != shard.columns[field, part].places[shard.value_of_row[field][i]]:
                raise CorruptShard(f"row {key}, field {field!r}, {part} is not where the index says")


def field_bytes(spec: CacheSpec, data: bytes) -> dict[str, int]:
    """Bytes that each field takes in ``data``, compressed, headers and padding of its members included."""
    sizes = {field.name: 0 for field in spec.fields}
    for (field, _), column in read_shard(spec, data).columns.items():
        sizes[field] += sum(tarfile.BLOCKSIZE + size + _padding(size) for _, size in column.places)
    return sizes


def _parts(spec: CacheSpec) -> Iterator[tuple[str, str, np.dtype[Any]]]:
    """Field, part and stored dtype, in the order of the archive."""
    for field in sorted(spec.fields, key=lambda field: field.name):
        for part, (_, dtype) in empty_layout(field).items():
            yield field.name, part, dtype


def _members_of(shard: Shard, i: int) -> Iterator[tuple[str, str]]:
    """Field and part of each frame that is stored with row ``i``."""
    return ((field, part) for field, part, _ in _parts(shard.spec) if shard.first_row(field, i) == i)


def _names(shard: Shard, i: int) -> list[str]:
    key = shard.ids[i].key
    return [f"{key}.json", *(f"{key}.{field}.{part}.blosc" for field, part in _members_of(shard, i))]


def _row_json(shard: Shard, i: int) -> bytes:
    def entry(field: FieldSpec) -> dict[str, Any]:
        first = shard.first_row(field.name, i)
        return {
            **describe(field),
            "shape": shard.shape(field.name, i),
            "parts": {part: dtype.str for part, (_, dtype) in empty_layout(field).items()},
            **({} if first == i else {"same_as": shard.ids[first].key}),
        }

    fields = {field.name: entry(field) for field in shard.spec.fields}
    row = shard.ids[i]
    return dump_json({"sample_id": row.sample_id, "image_sha256": row.image_sha256, "fields": fields})


def _index_json(spec: CacheSpec, ids: Sequence[RowId], shapes: _Shapes, places: _Places, size: int) -> bytes:
    def entry(field: FieldSpec) -> dict[str, Any]:
        values, shape_of = values_of_rows(field, ids), shapes[field.name].tolist()
        parts = {
            part: {"dtype": dtype.str, "places": [places[field.name, part][value] for value in values]}
            for part, (_, dtype) in empty_layout(field).items()
        }
        return {**describe(field), "shapes": [shape_of[value] for value in values], "parts": parts}

    return dump_json({"ids": ids, "size": size, "fields": {field.name: entry(field) for field in spec.fields}})


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _append(archive: io.BytesIO, name: str, content: bytes) -> int:
    """Where the content of the new member begins. A TarInfo knows no time, user or group unless it is told."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
    at = archive.tell()
    archive.write(content + bytes(_padding(len(content))))
    return at


def _find_index(data: bytes) -> tuple[int, bytes]:
    """Where the members of the rows begin, and the text of the index before them."""
    member = tarfile.TarInfo.frombuf(data[: tarfile.BLOCKSIZE], "utf-8", "strict")
    base = tarfile.BLOCKSIZE + member.size + _padding(member.size)
    if member.name != _INDEX or member.type != tarfile.REGTYPE or member.size < 0 or base > len(data):
        raise CorruptShard(f"found member {member.name!r} of {member.size} bytes first, expected {_INDEX!r}")
    return base, data[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + member.size]


def _parse(spec: CacheSpec, data: bytes, base: int, text: bytes) -> TarShard:
    index = json.loads(text)
    ids, size, entries = check_ids(index["ids"]), len(data) - base, index["fields"]
    if index["size"] != size:
        raise CorruptShard(f"found {size} bytes after the index, expected {index['size']}")
    expected = {field.name: describe(field) for field in spec.fields}
    found = {name: {key: entry[key] for key in entry.keys() - {"shapes", "parts"}} for name, entry in entries.items()}
    if found != expected:
        raise CorruptShard(f"found fields {found}, expected {expected}")
    firsts = {field.name: list(first_rows(values_of_rows(field, ids))) for field in spec.fields}
    shapes = {f.name: _parse_shapes(f, entries[f.name]["shapes"], len(ids))[firsts[f.name]] for f in spec.fields}
    places = {
        (field, part): _parse_places(entries[field]["parts"][part]["places"], len(ids), size)[firsts[field]].tolist()
        for field, part, _ in _parts(spec)
    }
    # Also where the later rows of an image have other shapes or places than the first.
    if text != _index_json(spec, ids, shapes, places, size):
        raise CorruptShard("the index says something twice, or something else than rows, shapes and places")
    shard = TarShard(spec, ids, shapes, data, base, places)
    check_budget(sum(sum(column.sizes) * column.dtype.itemsize for column in shard.columns.values()))
    return shard


def _parse_shapes(field: FieldSpec, rows: Any, count: int) -> NDArray[np.int32]:
    shapes = np.array(rows, np.int32).reshape(count, len(field.dims))
    check_shapes(field, shapes)
    return shapes


def _parse_places(rows: Any, count: int, end: int) -> NDArray[np.int64]:
    places = np.array(rows, np.int64).reshape(count, 2)
    if (places < 0).any() or (places[:, 0] > end - places[:, 1]).any():
        raise CorruptShard(f"the index names places beyond the {end} bytes after it")
    return places


def _members(data: bytes) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            return archive.getmembers()
    except Exception as error:  # bytes from a stranger may break tar in any way
        raise CorruptShard(f"not a readable tar archive: {error!r}") from error


def _place(member: tarfile.TarInfo) -> tuple[int, int]:
    if member.type != tarfile.REGTYPE or member.sparse is not None:
        raise CorruptShard(f"member {member.name!r} is no plain file")
    return member.offset_data, member.size

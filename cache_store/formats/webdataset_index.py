"""The first member of a tar shard: the JSON index that says where each frame is, and how it is checked.

See :mod:`alignkd.cache_store.formats.webdataset_shard` for the format.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats.encoding import check_ids, check_shapes, dump_json, field_metadata
from alignkd.cache_store.limits import load_json
from alignkd.cache_store.rows.layout import empty_layout, first_rows, values_of_rows
from alignkd.cache_store.rows.row import RowId
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

NAME = "__index__"

Shapes = Mapping[str, NDArray[np.int32]]
PartOf = tuple[str, str]
"""Names of a field and of one of its parts."""
Places = Mapping[PartOf, NDArray[np.int64]]
"""For each part: offset and size of the frame of each value, int64 [values, 2]."""


class Index(NamedTuple):
    """What an index says. ``places`` count from ``base``, the end of the index and its padding."""

    ids: tuple[RowId, ...]
    shapes: Shapes
    base: int
    places: Places


def stored_parts(spec: CacheSpec) -> list[tuple[str, str, np.dtype[Any]]]:
    """Field, part and stored dtype, in the order of the archive."""
    return sorted((field.name, part, dtype) for field in spec.fields for part, (_, dtype) in empty_layout(field).items())


def append_member(archive: io.BytesIO, name: str, content: bytes) -> int:
    """Write a tar member; returns where its content begins. The header has no time, user or group."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
    at = archive.tell()
    archive.write(content + bytes(_padding(len(content))))
    return at


def index_json(spec: CacheSpec, ids: Sequence[RowId], shapes: Shapes, places: Places, size: int) -> bytes:
    """The text of an index; ``size`` is the number of bytes after it."""

    def entry(field: FieldSpec) -> dict[str, Any]:
        values, parts = values_of_rows(field, ids), {}
        for part, (_, dtype) in empty_layout(field).items():
            offsets, sizes = places[field.name, part][values].T.tolist()
            parts[part] = {"dtype": dtype.str, "offsets": offsets, "sizes": sizes}
        return {**field_metadata(field), "shapes": shapes[field.name][values].tolist(), "parts": parts}

    return dump_json({"ids": ids, "size": size, "fields": {field.name: entry(field) for field in spec.fields}})


def read_index(spec: CacheSpec, data: bytes) -> Index:
    """The index of a shard. Frames are not read.

    Raises:
        CorruptShardError: it is damaged, does not match ``spec``, or names places outside the archive.
    """
    base, text = _find(data)
    index = load_json(text)
    ids, size, entries = check_ids(index["ids"]), len(data) - base, index["fields"]
    if index["size"] != size:
        raise CorruptShardError(f"found {size} bytes after the index, expected {index['size']}")
    expected = {field.name: field_metadata(field) for field in spec.fields}
    found = {name: {key: entry[key] for key in entry.keys() - {"shapes", "parts"}} for name, entry in entries.items()}
    if found != expected:
        raise CorruptShardError(f"found fields {found}, expected {expected}")
    firsts = {field.name: list(first_rows(values_of_rows(field, ids))) for field in spec.fields}
    shapes = {f.name: _parse_shapes(f, entries[f.name]["shapes"], len(ids))[firsts[f.name]] for f in spec.fields}
    places = {
        (field, part): _parse_places(entries[field]["parts"][part], len(ids), size)[firsts[field]]
        for field, part, _ in stored_parts(spec)
    }
    # This also finds later rows of an image whose shapes or places differ from the first row's.
    if text != index_json(spec, ids, shapes, places, size):
        raise CorruptShardError("the index says something twice, or something else than rows, shapes and places")
    taken = sum(int(places_of[:, 1].sum()) for places_of in places.values())
    if taken > size:
        raise CorruptShardError(f"the index names frames of {taken} bytes in the {size} bytes after it")
    return Index(ids, shapes, base, places)


def read_fields(data: bytes) -> tuple[FieldSpec, ...]:
    """The fields that the index of a shard describes. Any error of a damaged index passes."""
    entries = load_json(_find(data)[1])["fields"]
    return tuple(
        FieldSpec(name, **{key: entry[key] for key in entry.keys() - {"shapes", "parts"}}) for name, entry in entries.items()
    )


def read_shapes(field: FieldSpec, file: BinaryIO, rows: int) -> NDArray[np.int32]:
    """The decoded shapes of a field, ``[rows, ndim]``; only the index is read.

    Raises:
        CorruptShardError: it is damaged, or has another number of rows.
    """
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    size, _ = _header(file.read(tarfile.BLOCKSIZE), end)
    return _parse_shapes(field, load_json(file.read(size))["fields"][field.name]["shapes"], rows)


def _find(data: bytes) -> tuple[int, bytes]:
    """Where the members of the rows begin, and the text of the index."""
    size, base = _header(data[: tarfile.BLOCKSIZE], len(data))
    return base, data[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + size]


def _header(block: bytes, end: int) -> tuple[int, int]:
    """Bytes of the index, and where the members of the rows begin, from the first block of an archive of ``end`` bytes."""
    member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    base = tarfile.BLOCKSIZE + member.size + _padding(member.size)
    if member.name != NAME or member.type != tarfile.REGTYPE or member.size < 0 or base > end:
        raise CorruptShardError(f"found member {member.name!r} of {member.size} bytes first, expected {NAME!r}")
    return member.size, base


def _padding(size: int) -> int:
    return -size % tarfile.BLOCKSIZE


def _parse_shapes(field: FieldSpec, rows: Any, count: int) -> NDArray[np.int32]:
    shapes = np.array(rows, np.int32).reshape(count, len(field.dims))
    check_shapes(field, shapes)
    return shapes


def _parse_places(entry: Any, count: int, end: int) -> NDArray[np.int64]:
    offsets, sizes = (np.array(entry[name], np.int64).reshape(count) for name in ("offsets", "sizes"))
    if (offsets < 0).any() or (sizes < 0).any() or (offsets > end - sizes).any():
        raise CorruptShardError(f"the index names places beyond the {end} bytes after it")
    return np.stack([offsets, sizes], axis=1)

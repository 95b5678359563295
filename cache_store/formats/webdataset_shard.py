"""One shard as one object: a tar archive as webdataset reads it, and an index for reading rows in any order.

    __index__     JSON: "ids" [[key, sample_id, image_sha256], ...], "size" of all that follows, and "fields": for each dims,
                  dtype (decoded), codec, per_image, "shapes" of the rows, and "parts": dtype of each, and "offsets" and
                  "sizes" of the rows' frames
    KEY.json      for each row: sample_id, image_sha256, and "fields": of each [dtype, codec, shape, {part: [dtype, size]}]
    KEY.blosc     then the Blosc frames of its parts, one after the other, fields and parts by name; no values have no frame

A tar member takes 512 bytes and some padding, so a row has two, and not one for each part.

Rows with the same non-empty image_sha256 share the value of a per-image field: only the first has its frames. The others
have the same offsets and sizes in the index, and null for the parts in their KEY.json.

Offsets count from where ``__index__`` and its padding end. webdataset skips that member.

A shard may come from a stranger. The index has to be byte for byte what this module writes for what the index says, frames
have to lie in the archive and to take no more room than it has, and a frame has to declare the size that shape and codec
give before it is decompressed. Rows are found by the index alone; that the archive is what it says is for ``audit``.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.formats.encoding import check_budget, check_shapes, compress, decompress, describe, dump_json
from alignkd.cache_store.rows.shard import (
    CorruptShardError,
    RowId,
    Shard,
    check_ids,
    empty_layout,
    first_rows,
    part_sizes,
    values_of_rows,
)
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

NAME = "webdataset"
SUFFIX = ".tar"

_INDEX = "__index__"

_Shapes = Mapping[str, NDArray[np.int32]]
_PartOf = tuple[str, str]  # field and part
# Of each part: offset and size of the frame of each value, int64 [values, 2].
_Places = Mapping[_PartOf, NDArray[np.int64]]


class _Frames(NamedTuple):
    """Of one part in each value: where its frame begins and ends in the archive, and how many bytes are in it."""

    dtype: np.dtype[Any]
    starts: list[int]
    stops: list[int]
    nbytes: list[int]


class TarShard(Shard):
    """A shard whose frames lie in ``data``, their places counted from ``base``; each is decompressed when asked for."""

    def __init__(self, spec: CacheSpec, ids: Sequence[RowId], shapes: _Shapes, data: bytes, base: int, places: _Places) -> None:
        super().__init__(spec, ids, shapes)
        self.data = data
        elements = {field.name: part_sizes(field, shapes[field.name]) for field in spec.fields}
        self.frames: dict[_PartOf, _Frames] = {}
        for field, part, dtype in _parts(spec):
            starts = base + places[field, part][:, 0]
            nbytes = [count * dtype.itemsize for count in elements[field][part]]
            self.frames[field, part] = _Frames(dtype, starts.tolist(), (starts + places[field, part][:, 1]).tolist(), nbytes)

    def part(self, field: str, part: str, i: int) -> Array:
        """Decompressed just now."""
        dtype, starts, stops, nbytes = self.frames[field, part]
        value = self.value_of_row[field][i]
        try:
            return np.frombuffer(decompress(memoryview(self.data)[starts[value] : stops[value]], nbytes[value]), dtype)
        except CorruptShardError as error:
            raise CorruptShardError(f"row {self.ids[i].key}, field {field!r}, {part}: {error}") from error

    def frame(self, field: str, part: str, i: int) -> bytes:
        """As it lies in the archive."""
        frames, value = self.frames[field, part], self.value_of_row[field][i]
        return self.data[frames.starts[value] : frames.stops[value]]


def write_shard(shard: Shard) -> bytes:
    """The bytes of a shard: the same rows give the same bytes, with the same numcodecs."""
    return _archive(shard, lambda field, part, i: compress(shard.part(field, part, i)))


def read_shard(spec: CacheSpec, data: bytes) -> TarShard:
    """The shard in ``data``; CorruptShardError where it is none, or holds other than ``spec`` says. Frames are not looked
    at."""
    try:
        base, text = _find_index(data)
        return _parse(spec, data, base, text)
    except CorruptShardError:
        raise
    except Exception as error:  # bytes from a stranger may break tar and JSON in any way
        raise CorruptShardError(f"not a readable shard: {error!r}") from error


def audit(data: bytes, shard: Shard) -> None:
    """CorruptShard unless ``data``, which ``shard`` was read from, is to the byte the archive of its frames."""
    assert isinstance(shard, TarShard)
    expected = _archive(shard, shard.frame)
    if data != expected:
        at = _first_difference(data, expected)
        raise CorruptShardError(
            f"from byte {at} on the archive is not what follows from its index and the frames that it names"
        )


def field_bytes(spec: CacheSpec, data: bytes) -> dict[str, int]:
    """Bytes that the frames of each field take in ``data``; index, headers and padding are of the rows, not of a field."""
    sizes = {field.name: 0 for field in spec.fields}
    for (field, _), frames in read_shard(spec, data).frames.items():
        sizes[field] += sum(frames.stops) - sum(frames.starts)
    return sizes


def _parts(spec: CacheSpec) -> list[tuple[str, str, np.dtype[Any]]]:
    """Field, part and stored dtype, in the order of the archive."""
    return sorted((field.name, part, dtype) for field in spec.fields for part, (_, dtype) in empty_layout(field).items())


def _archive(shard: Shard, frame_of: Callable[[str, str, int], bytes]) -> bytes:
    """The archive of a shard, its frames given by field, part and row."""
    parts = [(field, part) for field, part, _ in _parts(shard.spec)]
    places: dict[_PartOf, list[tuple[int, int]]] = {part_of: [] for part_of in parts}
    body = io.BytesIO()
    for i, row in enumerate(shard.ids):
        frames = {(field, part): frame_of(field, part, i) for field, part in parts if shard.first_row(field, i) == i}
        _append(body, f"{row.key}.json", _row_json(shard, i, frames))
        at = _append(body, f"{row.key}.blosc", b"".join(frames.values()))
        for part_of, frame in frames.items():
            places[part_of].append((at, len(frame)))
            at += len(frame)
    body.write(bytes(2 * tarfile.BLOCKSIZE))
    arrays = {part_of: np.array(found, np.int64).reshape(-1, 2) for part_of, found in places.items()}
    head = io.BytesIO()
    _append(head, _INDEX, _index_json(shard.spec, shard.ids, shard.shapes, arrays, body.tell()))
    return head.getvalue() + body.getvalue()


def _row_json(shard: Shard, i: int, frames: Mapping[_PartOf, bytes]) -> bytes:
    """Lists where names would do: with few and small fields it fits into one block of 512 bytes."""

    def entry(field: FieldSpec) -> list[Any]:
        own = shard.first_row(field.name, i) == i
        parts = {part: [dtype.str, len(frames[field.name, part])] for part, (_, dtype) in empty_layout(field).items() if own}
        return [field.dtype, field.codec, shard.shape(field.name, i), parts or None]

    fields = {field.name: entry(field) for field in shard.spec.fields}
    row = shard.ids[i]
    return dump_json({"sample_id": row.sample_id, "image_sha256": row.image_sha256, "fields": fields})


def _index_json(spec: CacheSpec, ids: Sequence[RowId], shapes: _Shapes, places: _Places, size: int) -> bytes:
    def entry(field: FieldSpec) -> dict[str, Any]:
        values, parts = values_of_rows(field, ids), {}
        for part, (_, dtype) in empty_layout(field).items():
            offsets, sizes = places[field.name, part][values].T.tolist()
            parts[part] = {"dtype": dtype.str, "offsets": offsets, "sizes": sizes}
        return {**describe(field), "shapes": shapes[field.name][values].tolist(), "parts": parts}

    return dump_json({"ids": ids, "size": size, "fields": {field.name: entry(field) for field in spec.fields}})


def _first_difference(one: bytes, other: bytes) -> int:
    shorter = min(len(one), len(other))
    differs = np.frombuffer(one, np.uint8, shorter) != np.frombuffer(other, np.uint8, shorter)
    return int(differs.argmax()) if differs.any() else shorter


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
        raise CorruptShardError(f"found member {member.name!r} of {member.size} bytes first, expected {_INDEX!r}")
    return base, data[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + member.size]


def _parse(spec: CacheSpec, data: bytes, base: int, text: bytes) -> TarShard:
    index = json.loads(text)
    ids, size, entries = check_ids(index["ids"]), len(data) - base, index["fields"]
    if index["size"] != size:
        raise CorruptShardError(f"found {size} bytes after the index, expected {index['size']}")
    expected = {field.name: describe(field) for field in spec.fields}
    found = {name: {key: entry[key] for key in entry.keys() - {"shapes", "parts"}} for name, entry in entries.items()}
    if found != expected:
        raise CorruptShardError(f"found fields {found}, expected {expected}")
    firsts = {field.name: list(first_rows(values_of_rows(field, ids))) for field in spec.fields}
    shapes = {f.name: _parse_shapes(f, entries[f.name]["shapes"], len(ids))[firsts[f.name]] for f in spec.fields}
    places = {
        (field, part): _parse_places(entries[field]["parts"][part], len(ids), size)[firsts[field]]
        for field, part, _ in _parts(spec)
    }
    # Also where the later rows of an image have other shapes or places than the first.
    if text != _index_json(spec, ids, shapes, places, size):
        raise CorruptShardError("the index says something twice, or something else than rows, shapes and places")
    taken = sum(int(places_of[:, 1].sum()) for places_of in places.values())
    if taken > size:
        raise CorruptShardError(f"the index names frames of {taken} bytes in the {size} bytes after it")
    shard = TarShard(spec, ids, shapes, data, base, places)
    check_budget(sum(sum(frames.nbytes) for frames in shard.frames.values()))
    return shard


def _parse_shapes(field: FieldSpec, rows: Any, count: int) -> NDArray[np.int32]:
    shapes = np.array(rows, np.int32).reshape(count, len(field.dims))
    check_shapes(field, shapes)
    return shapes


def _parse_places(entry: Any, count: int, end: int) -> NDArray[np.int64]:
    offsets, sizes = (np.array(entry[name], np.int64).reshape(count) for name in ("offsets", "sizes"))
    if (offsets < 0).any() or (sizes < 0).any() or (offsets > end - sizes).any():
        raise CorruptShardError(f"the index names places beyond the {end} bytes after it")
    return np.stack([offsets, sizes], axis=1)

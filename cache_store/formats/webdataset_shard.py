"""One shard as one object: a tar archive that webdataset can read, with an index for reading rows in any order.

The members of the archive, in order::

    __index__     JSON: "ids" [[key, sample_id, image_sha256], ...]; "size", the number of bytes after the index; "fields": for
                  each field dims, dtype (decoded), codec, per_image, "shapes" of the rows, and "parts": for each part its
                  dtype, and "offsets" and "sizes" of the rows' frames
    KEY.json      per row: sample_id, image_sha256, and "fields": FIELD: [dtype, codec, shape, {PART: [dtype, size]}]
    KEY.blosc     then the Blosc frames of its parts, one after the other, sorted by field and part; no values, no frame

A tar member costs 512 bytes and some padding. So a row has two members, and not one per part.

Rows with the same non-empty image_sha256 share the value of a per-image field: only the first row has its frames. The other
rows have the same offsets and sizes in the index, and null for the parts in their KEY.json.

Offsets count from the end of ``__index__`` and its padding. webdataset skips that member.

A shard may come from a stranger. The index must be byte for byte what this module writes for the index's own content. Frames
must lie in the archive and take no more room than it has. A frame must declare the size that follows from shape and codec
before it is decompressed. Rows are found by the index alone; ``audit`` checks that the archive matches the index.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats import webdataset_index
from alignkd.cache_store.formats.encoding import check_budget, compress, decompress, dump_json
from alignkd.cache_store.formats.webdataset_index import Index, PartOf, append_member, index_json, read_index, stored_parts
from alignkd.cache_store.rows.layout import empty_layout, part_sizes
from alignkd.cache_store.rows.shard import Shard
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.errors import wrap_errors

NAME = "webdataset"
SUFFIX = ".tar"


class _Frames(NamedTuple):
    """One part, for each value: where its frame begins and ends in the archive, and its decompressed bytes."""

    dtype: np.dtype[Any]
    starts: list[int]
    stops: list[int]
    nbytes: list[int]


class TarShard(Shard):
    """A shard whose frames lie in ``data``; each is decompressed when it is read."""

    def __init__(self, spec: CacheSpec, data: bytes, index: Index) -> None:
        super().__init__(spec, index.ids, index.shapes)
        self.data = data
        elements = {field.name: part_sizes(field, index.shapes[field.name]) for field in spec.fields}
        self.frames: dict[PartOf, _Frames] = {}
        for field, part, dtype in stored_parts(spec):
            places = index.places[field, part]
            starts = index.base + places[:, 0]
            nbytes = [count * dtype.itemsize for count in elements[field][part]]
            self.frames[field, part] = _Frames(dtype, starts.tolist(), (starts + places[:, 1]).tolist(), nbytes)

    def part(self, field: str, part: str, i: int) -> Array:
        """Decompressed at every call."""
        dtype, starts, stops, nbytes = self.frames[field, part]
        value = self.value_of_row[field][i]
        try:
            return np.frombuffer(decompress(memoryview(self.data)[starts[value] : stops[value]], nbytes[value]), dtype)
        except CorruptShardError as error:
            raise CorruptShardError(f"row {self.ids[i].key}, field {field!r}, {part}: {error}") from error

    def frame(self, field: str, part: str, i: int) -> bytes:
        """The frame as it lies in the archive."""
        frames, value = self.frames[field, part], self.value_of_row[field][i]
        return self.data[frames.starts[value] : frames.stops[value]]


def write_shard(shard: Shard) -> bytes:
    """The bytes of a shard: the same rows give the same bytes, with the same numcodecs."""
    return _archive(shard, lambda field, part, i: compress(shard.part(field, part, i)))


def read_shard(spec: CacheSpec, data: bytes) -> TarShard:
    """The shard in ``data``. Frames are not read.

    Raises:
        CorruptShardError: ``data`` is not a shard, or does not match ``spec``.
    """
    # Bytes from a stranger may break tar and JSON in any way.
    with wrap_errors(CorruptShardError, "not a readable shard"):
        shard = TarShard(spec, data, read_index(spec, data))
        check_budget(sum(sum(frames.nbytes) for frames in shard.frames.values()))
        return shard


def read_shapes(spec: CacheSpec, file: BinaryIO, rows: int, field: str) -> NDArray[np.int32]:
    """The decoded shape of ``field`` in each row, ``[rows, ndim]``: from the index, which is the first member.

    Raises:
        CorruptShardError: ``file`` is not a shard with so many rows.
    """
    (wanted,) = (known for known in spec.fields if known.name == field)
    assert not wanted.per_image
    with wrap_errors(CorruptShardError, "not a readable shard"):
        return webdataset_index.read_shapes(wanted, file, rows)


def audit(data: bytes, shard: Shard) -> None:
    """Check that ``data``, which ``shard`` was read from, is exactly the archive of its frames.

    Raises:
        CorruptShardError: it is not; names the first byte that differs.
    """
    assert isinstance(shard, TarShard)
    expected = _archive(shard, shard.frame)
    if data != expected:
        at = _first_difference(data, expected)
        raise CorruptShardError(
            f"from byte {at} on the archive is not what follows from its index and the frames that it names"
        )


def field_bytes(spec: CacheSpec, data: bytes) -> dict[str, int]:
    """Bytes of the frames of each field in ``data``. Index, headers and padding belong to no field."""
    sizes = {field.name: 0 for field in spec.fields}
    for (field, _), frames in read_shard(spec, data).frames.items():
        sizes[field] += sum(frames.stops) - sum(frames.starts)
    return sizes


def _archive(shard: Shard, frame_of: Callable[[str, str, int], bytes]) -> bytes:
    """The archive of a shard; ``frame_of`` returns the frame of a field, part and row."""
    parts = [(field, part) for field, part, _ in stored_parts(shard.spec)]
    places: dict[PartOf, list[tuple[int, int]]] = {part_of: [] for part_of in parts}
    body = io.BytesIO()
    for i, row in enumerate(shard.ids):
        frames = {(field, part): frame_of(field, part, i) for field, part in parts if shard.first_row(field, i) == i}
        append_member(body, f"{row.key}.json", _row_json(shard, i, frames))
        at = append_member(body, f"{row.key}.blosc", b"".join(frames.values()))
        for part_of, frame in frames.items():
            places[part_of].append((at, len(frame)))
            at += len(frame)
    body.write(bytes(2 * tarfile.BLOCKSIZE))
    arrays = {part_of: np.array(found, np.int64).reshape(-1, 2) for part_of, found in places.items()}
    head = io.BytesIO()
    append_member(head, webdataset_index.NAME, index_json(shard.spec, shard.ids, shard.shapes, arrays, body.tell()))
    return head.getvalue() + body.getvalue()


def _row_json(shard: Shard, i: int, frames: Mapping[PartOf, bytes]) -> bytes:
    """Lists instead of named entries: so with few and small fields it fits in one block of 512 bytes."""

    def entry(field: FieldSpec) -> list[Any]:
        stored_here = shard.first_row(field.name, i) == i
        layout = empty_layout(field) if stored_here else {}
        sizes = {part: [dtype.str, len(frames[field.name, part])] for part, (_, dtype) in layout.items()}
        return [field.dtype, field.codec, shard.shape(field.name, i), sizes or None]

    fields = {field.name: entry(field) for field in shard.spec.fields}
    row = shard.ids[i]
    return dump_json({"sample_id": row.sample_id, "image_sha256": row.image_sha256, "fields": fields})


def _first_difference(one: bytes, other: bytes) -> int:
    shorter = min(len(one), len(other))
    differs = np.frombuffer(one, np.uint8, shorter) != np.frombuffer(other, np.uint8, shorter)
    return int(differs.argmax()) if differs.any() else shorter

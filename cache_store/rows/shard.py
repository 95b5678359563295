"""A shard in memory: the encoded arrays of its rows, concatenated, and what every shard format has to offer.

A format (``zarr_shard``, ``webdataset_shard``) turns a ``Shard`` into the bytes of one object and back, and knows
nothing else.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array, Layout, Shape, get_codec
from alignkd.cache_store.rows.row import EncodedField, Row, is_key
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec

# What the arrays of one shard may claim to hold before anything is decompressed.
MAX_SHARD_BYTES = 8 << 30


class CorruptShardError(ValueError):
    """A shard that is damaged, or that is not what its record and spec say."""


class RowId(NamedTuple):
    """Who a row belongs to; see ``Row``."""

    key: str
    sample_id: str
    image_sha256: str


class Shard(ABC):
    """The rows of one shard, still encoded. ``row`` decodes one; nothing is decoded before.

    ``value_of_row`` says, for each field, which of its stored values a row has (see ``values_of_rows``); ``shapes``
    holds the decoded shape of each value: int32 [values, ndim].
    """

    def __init__(self, spec: CacheSpec, ids: Sequence[RowId], shapes: Mapping[str, NDArray[np.int32]]) -> None:
        assert shapes.keys() == {field.name for field in spec.fields}
        self.spec, self.ids, self.shapes = spec, tuple(ids), shapes
        self.value_of_row = {field.name: values_of_rows(field, ids) for field in spec.fields}
        self._first_rows = {name: first_rows(values) for name, values in self.value_of_row.items()}
        assert all(len(shapes[name]) == len(firsts) for name, firsts in self._first_rows.items())
        self._fields = {field.name: field for field in spec.fields}
        # Looked up once a shard, not once a row: rows are small, and thousands a second are wanted.
        self._codecs = {field.name: (get_codec(field.codec), tuple(empty_layout(field))) for field in spec.fields}
        self._shape_of = {name: [tuple(shape) for shape in shape_array.tolist()] for name, shape_array in shapes.items()}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each row, in order."""
        return tuple(row.key for row in self.ids)

    @abstractmethod
    def part(self, field: str, part: str, i: int) -> Array:
        """One stored part of a field in row ``i``, flat; CorruptShardError where it is not what the shapes say."""

    def shape(self, field: str, i: int) -> tuple[int, ...]:
        """Decoded shape of ``field`` in row ``i``."""
        return self._shape_of[field][self.value_of_row[field][i]]

    def first_row(self, field: str, i: int) -> int:
        """The first row that has the same value of ``field`` as row ``i``; a format stores it with that row."""
        return self._first_rows[field][self.value_of_row[field][i]]

    def decoded_bytes(self) -> dict[str, int]:
        """Bytes that the decoded values of each field take, each value counted once."""
        return {f.name: sum(map(math.prod, self._shape_of[f.name])) * f.numpy_dtype.itemsize for f in self.spec.fields}

    def encoded(self, i: int) -> dict[str, dict[str, Array]]:
        """Stored parts of row ``i``: field -> part -> flat array."""
        return {field: {part: self.part(field, part, i) for part in parts} for field, (_, parts) in self._codecs.items()}

    def row(self, i: int, fields: Container[str] | None = None) -> Row:
        """Row ``i``, decoded into fresh arrays; of all fields, or of those named."""
        values = {
            field: codec.decode({part: self.part(field, part, i) for part in parts}, self.shape(field, i))
            for field, (codec, parts) in self._codecs.items()
            if fields is None or field in fields
        }
        return Row(*self.ids[i], values)

    def encoded_fields(self, i: int, fields: Iterable[str]) -> dict[str, EncodedField]:
        """These fields of row ``i`` as they are stored: for who decodes elsewhere."""
        return {name: self._stored(self._fields[name], i) for name in fields}

    def _stored(self, field: FieldSpec, i: int) -> EncodedField:
        shape = self.shape(field.name, i)
        layout = layout_of(field, shape)
        parts = {part: self.part(field.name, part, i).reshape(part_shape) for part, (part_shape, _) in layout.items()}
        return EncodedField(field, shape, parts)


class ColumnShard(Shard):
    """A shard whose parts are one array each, the values one after the other: ``parts[field][part]``."""

    def __init__(
        self,
        spec: CacheSpec,
        ids: Sequence[RowId],
        shapes: Mapping[str, NDArray[np.int32]],
        parts: Mapping[str, Mapping[str, Array]],
    ) -> None:
        super().__init__(spec, ids, shapes)
        self.parts = parts
        self.offsets = {field.name: part_offsets(field, shapes[field.name]) for field in spec.fields}

    def part(self, field: str, part: str, i: int) -> Array:
        """A view, not a copy."""
        at, value = self.offsets[field][part], self.value_of_row[field][i]
        return self.parts[field][part][at[value] : at[value + 1]]


class ShardFormat(Protocol):
    """One way to write a shard as one object."""

    NAME: str
    SUFFIX: str

    def write_shard(self, shard: Shard) -> bytes:
        """The bytes of a shard; the same rows give the same bytes."""
        ...

    def read_shard(self, spec: CacheSpec, data: bytes) -> Shard:
        """The shard in ``data``; CorruptShardError where it is none, or holds other than ``spec`` says."""
        ...

    def audit(self, data: bytes, shard: Shard) -> None:
        """CorruptShard where ``data`` holds anything that reading ``shard`` from it passed over."""
        ...

    def field_bytes(self, spec: CacheSpec, data: bytes) -> dict[str, int]:
        """Bytes that each field takes in ``data``, compressed."""
        ...


class EncodedRow(NamedTuple):
    """A row after its codecs: shape of each field, and its parts, flat: field -> part -> array."""

    id: RowId
    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Mapping[str, Array]]


def encode_row(spec: CacheSpec, row: Row) -> EncodedRow:
    """Encode one row; ValueError that names the sample for values that do not fit spec or codec."""
    assert is_key(row.key)
    _require_fields(spec, row)
    parts = {f.name: {part: a.reshape(-1) for part, a in _encode(f, row).items()} for f in spec.fields}
    return EncodedRow(
        RowId(row.key, row.sample_id, row.image_sha256), {f.name: row.values[f.name].shape for f in spec.fields}, parts
    )


def pack(spec: CacheSpec, rows: Sequence[EncodedRow]) -> ColumnShard:
    """Lay encoded rows one after the other, a per-image value where it first occurs.

    Later rows of the same images get the first one's value: it may differ from their own in its last bits, as a forward
    pass over another batch does. ValueError that names both samples where their shapes differ.
    """
    assert len({row.id.key for row in rows}) == len(rows)
    ids = [row.id for row in rows]
    shapes, parts = {}, {}
    for field in spec.fields:
        values = values_of_rows(field, ids)
        kept = [rows[i] for i in first_rows(values)]
        for row, value in zip(rows, values, strict=True):
            _require_shape(field, row, kept[value])
        shapes[field.name] = np.array([row.shapes[field.name] for row in kept], np.int32).reshape(len(kept), len(field.dims))
        parts[field.name] = _concatenate(field, [row.parts[field.name] for row in kept])
    return ColumnShard(spec, ids, shapes, parts)


def join(spec: CacheSpec, shard: Shard) -> ColumnShard:
    """Any shard with its parts laid one after the other."""
    if isinstance(shard, ColumnShard):
        return shard
    parts = {}
    for field in spec.fields:
        firsts = first_rows(shard.value_of_row[field.name])
        stored = [{part: shard.part(field.name, part, i) for part in empty_layout(field)} for i in firsts]
        parts[field.name] = _concatenate(field, stored)
    return ColumnShard(spec, shard.ids, shard.shapes, parts)


def values_of_rows(field: FieldSpec, ids: Sequence[RowId]) -> Sequence[int]:
    """Number of the value of ``field`` that each row has.

    Each row has its own, numbered as the rows are; of a per-image field rows with the same (non-empty) hash of their
    images share one, and values are numbered as they first occur.
    """
    if not field.per_image:
        return range(len(ids))
    numbers: dict[tuple[str, str], int] = {}
    owners = [(row.image_sha256, "" if row.image_sha256 else row.key) for row in ids]
    return [numbers.setdefault(owner, len(numbers)) for owner in owners]


def first_rows(value_of_row: Sequence[int]) -> Sequence[int]:
    """The first row that has each value, by the number of the value."""
    if isinstance(value_of_row, range):
        return value_of_row
    firsts: dict[int, int] = {}
    for i, value in enumerate(value_of_row):
        firsts.setdefault(value, i)
    return list(firsts.values())


def part_sizes(field: FieldSpec, shapes: NDArray[np.int32]) -> dict[str, list[int]]:
    """Elements of each part in each value, as Python integers, which hostile shapes cannot overflow."""
    layouts = [layout_of(field, tuple(shape)) for shape in shapes.tolist()]
    return {part: [math.prod(layout[part][0]) for layout in layouts] for part in empty_layout(field)}


def part_offsets(field: FieldSpec, shapes: NDArray[np.int32]) -> dict[str, list[int]]:
    """Where each value begins in each part, and where the last one ends: values + 1 numbers a part."""
    return {part: list(accumulate(sizes, initial=0)) for part, sizes in part_sizes(field, shapes).items()}


def empty_layout(field: FieldSpec) -> Layout:
    """The parts of ``field`` and their dtypes, for no elements."""
    return layout_of(field, (0,) * len(field.dims))


def layout_of(field: FieldSpec, shape: Shape) -> Layout:
    """The parts of a value of ``field`` with this shape; not to be changed, other callers get the same one."""
    return _layout(field.codec, field.dtype, shape)


# Rows of all shards have the same few thousand shapes, and each is asked for whenever a row is read.
@lru_cache(maxsize=1 << 14)
def _layout(codec: str, dtype: str, shape: Shape) -> Layout:
    return get_codec(codec).layout(shape, np.dtype(dtype))


def check_ids(entries: Any) -> tuple[RowId, ...]:
    """Row ids out of a shard's own index; CorruptShardError where they are something else."""
    try:
        ids = tuple(RowId(*entry) for entry in entries)
    except TypeError as error:
        raise CorruptShardError(f"the index is no list of rows: {error}") from error
    if not all(is_key(row.key) and isinstance(row.sample_id, str) and isinstance(row.image_sha256, str) for row in ids):
        raise CorruptShardError("the index holds something other than keys, sample ids and image hashes")
    if len({row.key for row in ids}) < len(ids):
        raise CorruptShardError("the index holds a key twice")
    return ids


def _concatenate(field: FieldSpec, values: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {
        part: np.concatenate([np.empty(0, dtype), *(value[part] for value in values)])
        for part, (_, dtype) in empty_layout(field).items()
    }


def _require_shape(field: FieldSpec, row: EncodedRow, first: EncodedRow) -> None:
    found, expected = row.shapes[field.name], first.shapes[field.name]
    if found != expected:
        raise ValueError(
            f"field {field.name!r} is stored once per image, but samples {first.id.sample_id!r} ({first.id.key}) and"
            f" {row.id.sample_id!r} ({row.id.key}) have the same image with shapes {list(expected)} and {list(found)}:"
            " it depends on more than the image, and cannot be a per-image field"
        )


def _require_fields(spec: CacheSpec, row: Row) -> None:
    for field in spec.fields:
        array = row.values.get(field.name)
        found = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
        if array is None or array.dtype != field.numpy_dtype or array.ndim != len(field.dims):
            expected = f"{field.dtype} [{', '.join(field.dims)}]"
            raise ValueError(f"{_where(row, field.name)}: found {found}, expected {expected}")
    for name in row.values.keys() - {field.name for field in spec.fields}:
        raise ValueError(f"{_where(row, name)}: the cache has no such field, it has {[f.name for f in spec.fields]}")


def _encode(field: FieldSpec, row: Row) -> dict[str, Array]:
    try:
        return get_codec(field.codec).encode(row.values[field.name])
    except ValueError as error:
        raise ValueError(f"{_where(row, field.name)}: {error}") from error


def _where(row: Row, field: str) -> str:
    return f"sample {row.sample_id!r} ({row.key}), field {field!r}"

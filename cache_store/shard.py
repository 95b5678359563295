"""A shard in memory: the encoded arrays of its rows, concatenated, and what every shard format has to offer.

A format (``zarr_shard``) turns a ``Shard`` into the bytes of one file and back, and knows nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array, Layout, get_codec
from alignkd.cache_store.row import Row, is_key
from alignkd.cache_store.spec import CacheSpec, FieldSpec

# What the arrays of one shard may claim to hold before anything is decompressed.
MAX_SHARD_BYTES = 8 << 30


class CorruptShard(ValueError):  # noqa: N818 - a name says what is the matter
    """A shard that is damaged, or that is not what its record and spec say."""


class RowId(NamedTuple):
    """Who a row belongs to; see ``Row``."""

    key: str
    sample_id: str
    image_sha256: str


@dataclass(frozen=True)
class Column:
    """One field of all rows: ``shapes`` int32 [rows, ndim], and each codec part as one array [sum of row sizes]."""

    shapes: NDArray[np.int32]
    parts: Mapping[str, Array]


@dataclass(frozen=True)
class Shard:
    """The rows of one shard, still encoded. ``row`` decodes one; nothing is decoded before."""

    spec: CacheSpec
    ids: tuple[RowId, ...]
    columns: Mapping[str, Column]

    def __post_init__(self) -> None:
        assert self.columns.keys() == {field.name for field in self.spec.fields}
        assert all(len(column.shapes) == len(self) for column in self.columns.values())

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each row, in order."""
        return tuple(row.key for row in self.ids)

    def shape(self, field: str, i: int) -> tuple[int, ...]:
        """Decoded shape of ``field`` in row ``i``."""
        return tuple(self.columns[field].shapes[i].tolist())

    def encoded(self, i: int) -> dict[str, dict[str, Array]]:
        """Stored parts of row ``i``, field -> part -> flat array: views, not copies."""
        return {
            field: {part: self.columns[field].parts[part][at[i] : at[i + 1]] for part, at in parts.items()}
            for field, parts in self._offsets.items()
        }

    def row(self, i: int) -> Row:
        """Row ``i``, decoded into fresh arrays."""
        encoded = self.encoded(i)
        values = {
            field.name: get_codec(field.codec).decode(encoded[field.name], self.shape(field.name, i))
            for field in self.spec.fields
        }
        return Row(*self.ids[i], values)

    @cached_property
    def _offsets(self) -> dict[str, dict[str, list[int]]]:
        return {
            field.name: {
                part: np.concatenate([[0], np.cumsum(sizes)]).tolist()
                for part, sizes in part_sizes(field, self.columns[field.name].shapes).items()
            }
            for field in self.spec.fields
        }


class ShardFormat(Protocol):
    """One way to write a shard as one object."""

    SUFFIX: str

    def write_shard(self, spec: CacheSpec, rows: Sequence[Row]) -> bytes:
        """The bytes of a shard; the same rows give the same bytes. ValueError for rows that do not fit the spec."""
        ...

    def read_shard(self, spec: CacheSpec, data: bytes) -> Shard:
        """The shard in ``data``; CorruptShard where it is none, or holds other than ``spec`` says."""
        ...

    def field_bytes(self, spec: CacheSpec, data: bytes) -> dict[str, int]:
        """Bytes that each field takes in ``data``, compressed."""
        ...


def pack(spec: CacheSpec, rows: Sequence[Row]) -> Shard:
    """Encode rows into a shard; ValueError that names the sample for values that do not fit spec or codec."""
    assert all(is_key(row.key) for row in rows)
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        _require_fields(spec, row)
    ids = tuple(RowId(row.key, row.sample_id, row.image_sha256) for row in rows)
    return Shard(spec, ids, {field.name: _pack_field(field, rows) for field in spec.fields})


def part_sizes(field: FieldSpec, shapes: NDArray[np.int32]) -> dict[str, list[int]]:
    """Elements of each part in each row, as Python integers, which hostile shapes cannot overflow."""
    sizes: dict[str, list[int]] = {part: [] for part in empty_layout(field)}
    codec = get_codec(field.codec)
    for shape in shapes.tolist():
        for part, (part_shape, _) in codec.layout(tuple(shape), field.numpy_dtype).items():
            sizes[part].append(math.prod(part_shape))
    return sizes


def empty_layout(field: FieldSpec) -> Layout:
    """The parts of ``field`` and their dtypes, for no elements."""
    return get_codec(field.codec).layout((0,) * len(field.dims), field.numpy_dtype)


def _pack_field(field: FieldSpec, rows: Sequence[Row]) -> Column:
    encoded = [_encode(field, row) for row in rows]
    shapes = np.array([row.values[field.name].shape for row in rows], dtype=np.int32)
    parts = {
        part: np.concatenate([np.empty(0, dtype), *(parts[part].reshape(-1) for parts in encoded)])
        for part, (_, dtype) in empty_layout(field).items()
    }
    return Column(shapes.reshape(len(rows), len(field.dims)), parts)


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

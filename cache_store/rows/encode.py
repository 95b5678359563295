"""Rows encoded one by one, then concatenated into a shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignkd.cache_store.codecs import Array, get_codec
from alignkd.cache_store.rows.layout import empty_layout, first_rows, values_of_rows
from alignkd.cache_store.rows.row import Row, RowId, is_key
from alignkd.cache_store.rows.shard import ColumnShard, Shard
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.errors import AlignkdError, CacheError


class EncodedRow(NamedTuple):
    """An encoded row: the decoded shape of each field, and its flat parts: field -> part -> array."""

    id: RowId
    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Mapping[str, Array]]


def encode_row(spec: CacheSpec, row: Row) -> EncodedRow:
    """Encode one row.

    Raises:
        CacheError: its fields do not match the spec, or a codec cannot store a value; names sample and field.
    """
    assert is_key(row.key)
    _require_fields(spec, row)
    parts = {f.name: {part: a.reshape(-1) for part, a in _encode(f, row).items()} for f in spec.fields}
    return EncodedRow(
        RowId(row.key, row.sample_id, row.image_sha256), {f.name: row.values[f.name].shape for f in spec.fields}, parts
    )


def concatenate_rows(spec: CacheSpec, rows: Sequence[EncodedRow]) -> ColumnShard:
    """A shard of encoded rows. A per-image value is stored with the first row of its image.

    Later rows of the same image get the first row's value. Their own may have differed in the last bits, since the teacher
    saw the image in another batch.

    Raises:
        CacheError: two rows of one image have different shapes of a per-image field; names both samples.
    """
    assert len({row.id.key for row in rows}) == len(rows)
    ids = [row.id for row in rows]
    shapes, parts = {}, {}
    for field in spec.fields:
        values = values_of_rows(field, ids)
        kept = [rows[i] for i in first_rows(values)]
        for row, value in zip(rows, values, strict=True):
            _require_same_shape(field, row, kept[value])
        shapes[field.name] = np.array([row.shapes[field.name] for row in kept], np.int32).reshape(len(kept), len(field.dims))
        parts[field.name] = _concatenate(field, [row.parts[field.name] for row in kept])
    return ColumnShard(spec, ids, shapes, parts)


def to_column_shard(spec: CacheSpec, shard: Shard) -> ColumnShard:
    """The same shard with each part in one array."""
    if isinstance(shard, ColumnShard):
        return shard
    parts = {}
    for field in spec.fields:
        firsts = first_rows(shard.value_of_row[field.name])
        values = [{part: shard.part(field.name, part, i) for part in empty_layout(field)} for i in firsts]
        parts[field.name] = _concatenate(field, values)
    return ColumnShard(spec, shard.ids, shard.shapes, parts)


def _concatenate(field: FieldSpec, values: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {
        part: np.concatenate([np.empty(0, dtype), *(value[part] for value in values)])
        for part, (_, dtype) in empty_layout(field).items()
    }


def _require_same_shape(field: FieldSpec, row: EncodedRow, first: EncodedRow) -> None:
    found, expected = row.shapes[field.name], first.shapes[field.name]
    if found != expected:
        raise CacheError(
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
            raise CacheError(f"{_name(row, field.name)}: found {found}, expected {expected}")
    for name in row.values.keys() - {field.name for field in spec.fields}:
        raise CacheError(f"{_name(row, name)}: the cache has no such field, it has {[f.name for f in spec.fields]}")


def _encode(field: FieldSpec, row: Row) -> dict[str, Array]:
    try:
        return get_codec(field.codec).encode(row.values[field.name])
    except AlignkdError as error:
        raise CacheError(f"{_name(row, field.name)}: {error}") from error


def _name(row: Row, field: str) -> str:
    return f"sample {row.sample_id!r} ({row.key}), field {field!r}"

"""Rewrite the values of a committed shard, with checksums that fit: what only the rules of rows can find."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.protocol.names import object_name, record_name
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.rows.encode import to_column_shard
from alignkd.cache_store.rows.layout import part_offsets
from alignkd.cache_store.rows.shard import ColumnShard


def forge(url: str | Path, change: Callable[[ColumnShard], None], number: int = 1) -> None:
    """Rewrite a shard with valid checksums."""
    reader = CacheReader(url)
    record, shard_format = reader.records[number], get_format(reader.shard_format)
    shard = to_column_shard(reader.spec, reader.shard(number))
    parts = {field: {part: array.copy() for part, array in parts.items()} for field, parts in shard.parts.items()}
    forged = ColumnShard(shard.spec, shard.ids, {name: shapes.copy() for name, shapes in shard.shapes.items()}, parts)
    change(forged)
    forged = ColumnShard(forged.spec, forged.ids, forged.shapes, forged.parts)
    data = shard_format.write_shard(forged)
    name = object_name(number, data, shard_format.SUFFIX)
    reader.storage.delete(record.object)
    reader.storage.write(name, data)
    digests = {"crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest()}
    reader.storage.delete(record_name(number))
    reader.storage.write(record_name(number), replace(record, object=name, bytes=len(data), **digests).to_json().encode())


def set_all(field: str, part: str, value: float) -> Callable[[ColumnShard], None]:
    def change(shard: ColumnShard) -> None:
        shard.parts[field][part][:] = value

    return change


def reshape(axis: int, by: int, *fields: str) -> Callable[[ColumnShard], None]:
    """Add ``by`` to an axis of the first value that has something there, and as much as that needs to its parts."""

    def change(shard: ColumnShard) -> None:
        for name in fields:
            field = next(field for field in shard.spec.fields if field.name == name)
            value = int(np.flatnonzero(shard.shapes[name].prod(axis=1))[0])
            shard.shapes[name][value, axis] += by
            shard.offsets[name] = part_offsets(field, shard.shapes[name])
            for part, offsets in shard.offsets[name].items():
                shard.parts[name][part] = np.resize(shard.parts[name][part], offsets[-1])

    return change

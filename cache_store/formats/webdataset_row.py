"""One row of a tar shard from its two members alone, as a stream of samples gives them: no index, no manifest.

The members come from a stranger: sizes are compared with shapes and codecs before anything is decompressed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from alignkd.cache_store.codecs import Array, get_codec
from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats.encoding import check_budget, check_ids, check_shapes, decompress
from alignkd.cache_store.formats.webdataset_index import read_fields
from alignkd.cache_store.formats.webdataset_shard import TarShard, read_shard
from alignkd.cache_store.limits import load_json
from alignkd.cache_store.rows.layout import layout_of
from alignkd.cache_store.rows.row import Row, RowId
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec
from alignkd.errors import wrap_errors


class _Frame(NamedTuple):
    """A part of a field in ``KEY.blosc``: its dtype, where it lies, and its decompressed bytes."""

    part: str
    dtype: np.dtype[Any]
    start: int
    stop: int
    nbytes: int


class StreamedRow:
    """A row that decodes itself. ``shared``: the fields whose values lie with an earlier row of the same images.

    Args:
        key: The name that the two members have in common.
        described: ``KEY.json``.
        frames: ``KEY.blosc``.

    Raises:
        CorruptShardError: they are not the members of a row.
    """

    def __init__(self, key: str, described: bytes, frames: bytes) -> None:
        with wrap_errors(CorruptShardError, f"row {key}: not a row of a tar shard of a cache"):
            content = load_json(described)
            (self.id,) = check_ids([[key, content["sample_id"], content["image_sha256"]]])
            self.frames, at = frames, 0
            self._fields: dict[str, tuple[FieldSpec, tuple[int, ...], list[_Frame]]] = {}
            shared = []
            for name, (dtype, codec, shape, parts) in sorted(content["fields"].items()):
                field = FieldSpec(name, tuple(f"axis{i}" for i in range(len(shape))), dtype, codec)
                places, at = _places(field, _shape(field, shape), parts or {}, at)
                shared += [name] if parts is None else []
                self._fields[name] = field, tuple(shape), places
            if at != len(frames):
                raise CorruptShardError(f"found {len(frames)} bytes of frames, expected {at}")
            check_budget(sum(frame.nbytes for *_, places in self._fields.values() for frame in places))
            self.shared = frozenset(shared)

    def values(self, fields: frozenset[str] | None = None) -> dict[str, Array]:
        """The decoded values of ``fields``, or of all that are not shared.

        Raises:
            CorruptShardError: a frame is damaged, or a field is not stored with this row.
        """
        if fields is not None and not fields <= self._fields.keys() - self.shared:
            raise CorruptShardError(f"row {self.id.key} does not hold the values of its images")
        wanted = self._fields.keys() - self.shared if fields is None else fields
        return {name: self._decode(name) for name in self._fields if name in wanted}

    def row(self, of_images: Callable[[RowId, frozenset[str]], Mapping[str, Array]]) -> Row:
        """The whole row; ``of_images`` returns the values of its shared fields."""
        values = self.values()
        if self.shared:
            values |= of_images(self.id, self.shared)
        return Row(*self.id, {name: values[name] for name in self._fields})

    def _decode(self, name: str) -> Array:
        field, shape, places = self._fields[name]
        with wrap_errors(CorruptShardError, f"row {self.id.key}, field {name!r}"):
            parts = {
                frame.part: np.frombuffer(
                    decompress(memoryview(self.frames)[frame.start : frame.stop], frame.nbytes), frame.dtype
                )
                for frame in places
            }
            return get_codec(field.codec).decode(parts, shape)


def read_alone(data: bytes) -> TarShard:
    """A shard that describes its fields itself: nothing is compared with a cache's manifest or records.

    Raises:
        CorruptShardError: ``data`` is not a shard.
    """
    with wrap_errors(CorruptShardError, "not a readable shard"):
        spec = CacheSpec(read_fields(data), {})
    return read_shard(spec, data)


def _shape(field: FieldSpec, shape: Any) -> tuple[int, ...]:
    if not all(type(size) is int for size in shape):
        raise CorruptShardError(f"field {field.name!r} has the shape {shape!r}")
    check_shapes(field, np.array([shape], np.int32).reshape(1, len(shape)))
    return tuple(shape)


def _places(field: FieldSpec, shape: tuple[int, ...], parts: Mapping[str, Any], at: int) -> tuple[list[_Frame], int]:
    """The frames of a field, the first at ``at``, and where they end. No parts: its values lie elsewhere."""
    layout, frames = layout_of(field, shape), list[_Frame]()
    if parts and parts.keys() != layout.keys():
        raise CorruptShardError(f"field {field.name!r} has the parts {sorted(parts)}, expected {sorted(layout)}")
    for part, (stored, size) in sorted(parts.items()):
        part_shape, dtype = layout[part]
        if stored != dtype.str or type(size) is not int or size < 0:
            raise CorruptShardError(f"field {field.name!r}, {part}: found {stored!r} of {size!r} bytes, expected {dtype.str!r}")
        frames.append(_Frame(part, dtype, at, at + size, int(np.prod(part_shape, dtype=object)) * dtype.itemsize))
        at += size
    return frames, at

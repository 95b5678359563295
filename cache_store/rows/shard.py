"""A shard in memory: encoded rows, each decoded when it is read."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array, get_codec
from alignkd.cache_store.rows.layout import empty_layout, first_rows, layout_of, part_offsets, values_of_rows
from alignkd.cache_store.rows.row import EncodedField, Row, RowId
from alignkd.cache_store.rows.spec import CacheSpec, FieldSpec


class Shard(ABC):
    """The encoded rows of one shard. ``row`` decodes one row; nothing is decoded earlier.

    ``value_of_row`` has, for each field, the number of the stored value of each row (see ``values_of_rows``); ``shapes``
    has the decoded shape of each value: int32 [values, ndim].
    """

    def __init__(self, spec: CacheSpec, ids: Sequence[RowId], shapes: Mapping[str, NDArray[np.int32]]) -> None:
        assert shapes.keys() == {field.name for field in spec.fields}
        self.spec, self.ids, self.shapes = spec, tuple(ids), shapes
        self.value_of_row = {field.name: values_of_rows(field, ids) for field in spec.fields}
        self._first_rows = {name: first_rows(values) for name, values in self.value_of_row.items()}
        assert all(len(shapes[name]) == len(firsts) for name, firsts in self._first_rows.items())
        self._fields = {field.name: field for field in spec.fields}
        # Looked up once per shard instead of once per row: rows are small, and thousands are read per second.
        self._codecs = {field.name: (get_codec(field.codec), tuple(empty_layout(field))) for field in spec.fields}
        self.on_read: Callable[[Shard, str, int, dict[str, Array]], None] | None = None
        """Called with the shard, field, row and parts whenever a row is read."""
        self._shape_of = {name: [tuple(shape) for shape in shape_array.tolist()] for name, shape_array in shapes.items()}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def keys(self) -> tuple[str, ...]:
        """The key of each row, in order."""
        return tuple(row.key for row in self.ids)

    @abstractmethod
    def part(self, field: str, part: str, i: int) -> Array:
        """One stored part of a field in row ``i``, flat.

        Raises:
            CorruptShardError: it does not have the size that follows from the shapes.
        """

    def shape(self, field: str, i: int) -> tuple[int, ...]:
        """Decoded shape of ``field`` in row ``i``."""
        return self._shape_of[field][self.value_of_row[field][i]]

    def first_row(self, field: str, i: int) -> int:
        """The first row with the same value of ``field`` as row ``i``; a format stores the value with that row."""
        return self._first_rows[field][self.value_of_row[field][i]]

    def decoded_bytes(self) -> dict[str, int]:
        """Bytes of the decoded values of each field; a shared value counts once."""
        return {f.name: sum(map(math.prod, self._shape_of[f.name])) * f.numpy_dtype.itemsize for f in self.spec.fields}

    def encoded(self, i: int) -> dict[str, dict[str, Array]]:
        """Stored parts of row ``i``: field -> part -> flat array."""
        return {field: self._parts(field, i) for field in self._codecs}

    def row(self, i: int, fields: Container[str] | None = None) -> Row:
        """Row ``i``, decoded into new arrays: all fields, or only ``fields``."""
        values = {
            field: codec.decode(self._parts(field, i), self.shape(field, i))
            for field, (codec, _) in self._codecs.items()
            if fields is None or field in fields
        }
        return Row(*self.ids[i], values)

    def encoded_fields(self, i: int, fields: Iterable[str]) -> dict[str, EncodedField]:
        """``fields`` of row ``i``, still encoded, for a caller that decodes them itself."""
        return {name: self._encoded_field(self._fields[name], i) for name in fields}

    def _encoded_field(self, field: FieldSpec, i: int) -> EncodedField:
        shape = self.shape(field.name, i)
        flat = self._parts(field.name, i)
        parts = {part: flat[part].reshape(part_shape) for part, (part_shape, _) in layout_of(field, shape).items()}
        return EncodedField(field, shape, parts)

    def _parts(self, field: str, i: int) -> dict[str, Array]:
        parts = {part: self.part(field, part, i) for part in self._codecs[field][1]}
        if self.on_read is not None:
            self.on_read(self, field, i, parts)
        return parts


class ColumnShard(Shard):
    """A shard with one array per part, in which the values follow each other: ``parts[field][part]``."""

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

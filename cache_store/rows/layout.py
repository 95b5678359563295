"""Which stored value each row has, and how many elements of each part belong to it. All follows from ids and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Layout, Shape, get_codec
from alignkd.cache_store.rows.row import RowId
from alignkd.cache_store.rows.spec import FieldSpec


def values_of_rows(field: FieldSpec, ids: Sequence[RowId]) -> Sequence[int]:
    """The number of the stored value of ``field`` that each row has.

    A field that is not per-image has one value per row, numbered as the rows. Rows with the same (non-empty) image hash
    share one value of a per-image field; values are numbered in the order in which they first occur.
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
    """Elements of each part in each value: Python integers, which shapes of a hostile shard cannot overflow."""
    layouts = [layout_of(field, tuple(shape)) for shape in shapes.tolist()]
    return {part: [math.prod(layout[part][0]) for layout in layouts] for part in empty_layout(field)}


def part_offsets(field: FieldSpec, shapes: NDArray[np.int32]) -> dict[str, list[int]]:
    """Where each value begins in each concatenated part, and where the last one ends: values + 1 numbers per part."""
    return {part: list(accumulate(sizes, initial=0)) for part, sizes in part_sizes(field, shapes).items()}


def empty_layout(field: FieldSpec) -> Layout:
    """The parts of ``field`` and their dtypes, for a value without elements."""
    return layout_of(field, (0,) * len(field.dims))


def layout_of(field: FieldSpec, shape: Shape) -> Layout:
    """The parts of a value of ``field`` with this shape. The result is cached and shared: do not change it."""
    return _layout(field.codec, field.dtype, shape)


# The rows of all shards have the same few thousand shapes, and reading a row needs the layout of its shape.
@lru_cache(maxsize=1 << 14)
def _layout(codec: str, dtype: str, shape: Shape) -> Layout:
    return get_codec(codec).layout(shape, np.dtype(dtype))

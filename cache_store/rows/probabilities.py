"""Whether stored attention is attention: values in [0, 1], in rows that sum to at most 1.

Shapes: V vision columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from alignkd.cache_store.codecs import Array
from alignkd.cache_store.rows.values import SLACK, Found, Values

_CHUNK_BYTES = 1 << 18
"""Codes that are summed at once: so many fit in a processor's cache."""

_NIBBLES = np.arange(256)
_NIBBLE_SQUARES = ((_NIBBLES & 15) ** 2 + (_NIBBLES >> 4) ** 2).astype(np.uint16)


def probabilities(values: Values) -> Found:
    """Attention: each value is in [0, 1], and those of a row sum to at most 1."""
    if "scales" in values.parts:
        scales = values.parts["scales"]
        limit = (1 + SLACK) / (127 if values.codec == "int8-rows" else 1)
        if scales.size and float(scales.max()) > limit:
            at = int(scales.argmax())
            return values.holding("scales", at), f"found a scale of {scales[at]:g}, expected at most {limit:.3g}"
    for first, part, sums, scales, width in _row_sums(values):
        largest, room = _allowed(values.codec, sums, scales, width)
        bad = ~((sums <= 1 + SLACK + room) & (largest <= 1 + SLACK))
        if bad.any():
            at = int(bad.argmax())
            found = f"found a row with a sum of {sums[at]:.4g}, whose largest value is {largest[at]:.4g}"
            step = values.stride * (1 if part == "scales" else width)
            return values.holding(part, first + at * step), f"{found}, expected at most 1"
    if values.codec in ("float16", "exact", "int8-rows"):
        part = "codes" if values.codec == "int8-rows" else "values"
        array = values.parts[part]
        if array.size and float(array.min()) < 0:
            return values.holding(part, int((array < 0).argmax())), "found a negative value, expected a probability"
    return None


def _allowed(codec: str, sums: Array, scales: Array, width: int) -> tuple[Array, Array]:
    """The largest value of each row, and how far its sum may lie above that of the values that were encoded."""
    if codec in ("sqrt8", "sqrt4"):
        # A code is at most half a step too high. By Cauchy and Schwarz, sum of c <= sqrt(width x sum of c^2).
        return scales, np.sqrt(scales * width * sums) / (255 if codec == "sqrt8" else 15)
    if codec == "int8-rows":
        return scales * 127, scales * (width / 2)
    return scales, np.full_like(sums, width * 2.0**-12)


def _row_sums(values: Values) -> Iterator[tuple[int, str, Array, Array, int]]:
    """For runs of values of one width: first element, its part, sums and scales (or largest values) of the rows, width."""
    if values.codec not in ("sqrt8", "sqrt4", "int8-rows", "float16", "exact"):
        return
    widths = [shape[-1] for shape in values.shapes]
    start = 0
    for stop in range(1, len(widths) + 1):
        if stop < len(widths) and widths[stop] == widths[start]:
            continue
        if widths[start]:
            yield from _sums_of_run(values, start, stop, widths[start])
        start = stop


def _sums_of_run(values: Values, start: int, stop: int, width: int) -> Iterator[tuple[int, str, Array, Array, int]]:
    part = "codes" if "codes" in values.parts else "values"
    stored_width = (width + 1) // 2 if values.codec == "sqrt4" else width
    at, end = values.offsets[part][start], values.offsets[part][stop]
    rows = values.parts[part][at:end].reshape(-1, stored_width)
    scales = None
    if "scales" in values.parts:
        scales_at = values.offsets["scales"][start]
        scales = values.parts["scales"][scales_at : values.offsets["scales"][stop]].astype(np.float32)
    step = max(_CHUNK_BYTES // stored_width, 1) * values.stride
    for i in range(0, len(rows), step):
        chunk = rows[i : i + step : values.stride]
        if scales is None:
            wide = chunk.astype(np.float32)
            yield at + i * width, "values", wide.sum(axis=1), wide.max(axis=1), width
        else:
            part_scales = scales[i : i + step : values.stride]
            yield scales_at + i, "scales", _scaled_sums(values.codec, chunk, part_scales), part_scales, width


def _scaled_sums(codec: str, rows: Array, scales: Array) -> Array:
    if codec == "sqrt8":
        wide = rows.astype(np.float32)
        squares: Array = np.einsum("rv,rv->r", wide, wide)
        return squares * (scales / np.float32(255**2))
    summed: Array = (_NIBBLE_SQUARES[rows] if codec == "sqrt4" else rows).sum(axis=1, dtype=np.float32)
    return summed * (scales / np.float32(15**2) if codec == "sqrt4" else scales)

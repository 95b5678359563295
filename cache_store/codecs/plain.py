"""Codecs without a scale: values as they are, or rounded to float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs.contract import (
    FLOAT16_MAX,
    Array,
    Layout,
    Shape,
    require_at_most,
    require_finite,
    require_float32,
    stored,
)


class Exact:
    """Integers and floats as they are."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """One part, like the array."""
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise ValueError(f"codec 'exact' stores integers and floats of up to 8 bytes, not {dtype}")
        return {"values": (shape, stored(dtype))}

    def encode(self, array: Array) -> dict[str, Array]:
        """The array itself, in the stored byte order."""
        _, dtype = self.layout(array.shape, array.dtype)["values"]
        return {"values": array.astype(dtype, copy=False)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """A copy, so that a caller who writes into it does not write into the shard."""
        values = parts["values"]
        return values.astype(values.dtype.newbyteorder("=")).reshape(shape)

    def error_bound(self, array: Array) -> NDArray[np.float64]:
        """Zero."""
        return np.zeros((1,) * array.ndim)


class Float16:
    """float32 rounded to float16: a relative error of 2^-11, and 2^-25 absolute near zero."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """One part, half as wide."""
        require_float32("float16", dtype)
        return {"values": (shape, stored(np.dtype(np.float16)))}

    def encode(self, array: Array) -> dict[str, Array]:
        """Rounded to nearest; ValueError for NaN, infinities and |x| > 65504, which float16 cannot hold."""
        _, dtype = self.layout(array.shape, array.dtype)["values"]
        require_finite("float16", array)
        require_at_most("float16", FLOAT16_MAX, array)
        return {"values": array.astype(dtype)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        return parts["values"].astype(np.float32).reshape(shape)

    def error_bound(self, array: Array) -> NDArray[np.float64]:
        """Half a unit in the last place: of the value where float16 is normal, of the smallest step below that."""
        return np.maximum(np.abs(array, dtype=np.float64) * 2.0**-11, 2.0**-25)

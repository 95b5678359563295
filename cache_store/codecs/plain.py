"""Codecs without a scale: values unchanged, or rounded to float16."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.cache_store.codecs.contract import (
    FLOAT16_MAX,
    Array,
    Layout,
    Shape,
    little_endian,
    require_at_most,
    require_finite,
    require_float32,
)
from alignkd.errors import ConfigError


class Exact:
    """Integers and floats, unchanged. Error: 0."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """One part, ``values``, with the shape and dtype of the array."""
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise ConfigError(f"codec 'exact' stores integers and floats of up to 8 bytes, not {dtype}")
        return {"values": (shape, little_endian(dtype))}

    def encode(self, array: Array) -> dict[str, Array]:
        """The array itself, in the stored byte order."""
        _, dtype = self.layout(array.shape, array.dtype)["values"]
        return {"values": array.astype(dtype, copy=False)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """A copy, so that a caller who writes into it does not change the shard."""
        values = parts["values"]
        return values.astype(values.dtype.newbyteorder("=")).reshape(shape)


class Float16:
    """float32 rounded to float16. Error: at most max(2^-11 |x|, 2^-25)."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """One part, ``values``, with the shape of the array."""
        require_float32("float16", dtype)
        return {"values": (shape, little_endian(np.dtype(np.float16)))}

    def encode(self, array: Array) -> dict[str, Array]:
        """Round to nearest.

        Raises:
            ConfigError: NaN, infinities, or values beyond 65504, which float16 cannot hold.
        """
        _, dtype = self.layout(array.shape, array.dtype)["values"]
        require_finite("float16", array)
        require_at_most("float16", FLOAT16_MAX, array)
        return {"values": array.astype(dtype)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        return parts["values"].astype(np.float32).reshape(shape)

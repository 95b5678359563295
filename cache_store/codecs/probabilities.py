"""Codecs for probabilities such as attention: fine steps for small values, because most values are small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs.contract import (
    FLOAT16_MAX,
    Array,
    Layout,
    Shape,
    little_endian,
    require_at_most,
    require_finite,
    require_float32,
    require_rows,
    round_up_to_float16,
)
from alignkd.cache_store.codecs.nibbles import pack_nibbles, packed_shape, unpack_nibbles
from alignkd.errors import ConfigError


class SquareRoot:
    """float32 of 0 and more as codes of 8 or 4 bits: ``scale * (code / levels)^2``, ``levels`` 255 or 15.

    One float16 scale per vector along the last axis: its largest value, rounded up. Error: at most
    ``sqrt(value * scale) / levels + scale / (2 * levels)^2`` (and the rounding of float32); zeros stay zeros. ``sqrt4`` puts
    two codes in a byte.
    """

    def __init__(self, bits: Literal[4, 8]) -> None:
        self.name, self.packed, self.levels = f"sqrt{bits}", bits == 4, 2**bits - 1

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """``codes`` have the array's shape (4 bits: the last axis half as long, rounded up), ``scales`` lack the last axis."""
        require_float32(self.name, dtype)
        require_rows(self.name, shape)
        codes = packed_shape(shape) if self.packed else shape
        return {"codes": (codes, np.dtype(np.uint8)), "scales": (shape[:-1], little_endian(np.dtype(np.float16)))}

    def encode(self, array: Array) -> dict[str, Array]:
        """Round the square roots to nearest.

        Raises:
            ConfigError: NaN, infinities, negative values, or values beyond 65504.
        """
        _, dtype = self.layout(array.shape, array.dtype)["scales"]
        require_finite(self.name, array)
        smallest = array.min(initial=0)
        if smallest < 0:
            raise ConfigError(f"codec {self.name!r} stores values of 0 and more, found {smallest:g}: use 'int8-rows'")
        require_at_most(self.name, FLOAT16_MAX, array)
        scales = self._scales(array)
        # A row of zeros has scale zero; dividing by one instead keeps its codes zero.
        roots = np.sqrt(array / np.where(scales > 0, scales, 1).astype(np.float32)[..., None])
        codes = np.rint(roots * np.float32(self.levels)).astype(np.uint8)
        return {"codes": pack_nibbles(codes) if self.packed else codes, "scales": scales.astype(dtype, copy=False)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        codes = unpack_nibbles(parts["codes"], shape) if self.packed else parts["codes"].reshape(shape)
        steps = parts["scales"].astype(np.float32).reshape(shape[:-1])[..., None] / np.float32(self.levels**2)
        decoded: Array = np.square(codes, dtype=np.float32) * steps
        return decoded

    @staticmethod
    def _scales(array: Array) -> NDArray[np.float16]:
        return round_up_to_float16(array.max(axis=-1, initial=0))

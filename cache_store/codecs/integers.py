"""float32 as small signed integers, for vision tokens: one scale per token, or per block of 64 of its values."""

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
    little_endian,
    require_at_most,
    require_finite,
    require_float32,
    require_rows,
    round_up_to_float16,
)
from alignkd.cache_store.codecs.nibbles import pack_nibbles, packed_shape, unpack_nibbles

INT8_MAX = 127
INT4_MAX = 7
BLOCK = 64


class Int8Rows:
    """float32 as symmetric int8, with one float32 scale per vector along the last axis.

    Error: at most scale / 2 (and the rounding of float32); a scale is 1/127 of the vector's largest absolute value.
    """

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """``codes`` have the shape of the array, ``scales`` lack its last axis."""
        require_float32("int8-rows", dtype)
        require_rows("int8-rows", shape)
        return {"codes": (shape, np.dtype(np.int8)), "scales": (shape[:-1], little_endian(np.dtype(np.float32)))}

    def encode(self, array: Array) -> dict[str, Array]:
        """Round to nearest.

        Raises:
            ConfigError: NaN or infinities.
        """
        _, dtype = self.layout(array.shape, array.dtype)["scales"]
        require_finite("int8-rows", array)
        scales = self._scales(array)
        codes = np.rint(array / _divisors(scales)[..., None])
        return {
            "codes": np.clip(codes, -INT8_MAX, INT8_MAX).astype(np.int8),
            "scales": scales.astype(dtype, copy=False),
        }

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        scales = parts["scales"].astype(np.float32, copy=False).reshape(shape[:-1])
        decoded: Array = parts["codes"].reshape(shape) * scales[..., None]
        return decoded

    @staticmethod
    def _scales(array: Array) -> NDArray[np.float32]:
        # Rounded down, so that 127 * scale is never above the largest value of the row, and never overflows.
        exact = np.abs(array, dtype=np.float64).max(axis=-1, initial=0) / INT8_MAX
        scales = np.asarray(exact, dtype=np.float32)
        return np.where(scales > exact, np.nextafter(scales, np.float32(0)), scales)


class Int4Blocks:
    """float32 as symmetric integers from -7 to 7, two per byte, with one float16 scale per 64 values along the last axis.

    Error: at most scale / 2 (and the rounding of float32); a scale is 1/7 of the block's largest absolute value, rounded up.
    The last block may be shorter.
    """

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """The last axis of ``codes`` is half as long as the array's, that of ``scales`` 1/64 as long, both rounded up."""
        require_float32("int4-blocks", dtype)
        require_rows("int4-blocks", shape)
        return {
            "codes": (packed_shape(shape), np.dtype(np.uint8)),
            "scales": ((*shape[:-1], -(-shape[-1] // BLOCK)), little_endian(np.dtype(np.float16))),
        }

    def encode(self, array: Array) -> dict[str, Array]:
        """Round to nearest.

        Raises:
            ConfigError: NaN, infinities, or values beyond 7 * 65504.
        """
        _, dtype = self.layout(array.shape, array.dtype)["scales"]
        require_finite("int4-blocks", array)
        require_at_most("int4-blocks", INT4_MAX * FLOAT16_MAX, array)
        scales = self._scales(array)
        codes = np.rint(array / self._spread(_divisors(scales).astype(np.float32), array.shape)).astype(np.int8)
        # The low half of the two's complement: so the code of zero is zero, and padding decodes to zero.
        return {"codes": pack_nibbles((codes & 15).astype(np.uint8)), "scales": scales.astype(dtype, copy=False)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        scales_shape, _ = self.layout(shape, np.dtype(np.float32))["scales"]
        scales = parts["scales"].astype(np.float32).reshape(scales_shape)
        codes = (unpack_nibbles(parts["codes"], shape) ^ 8).astype(np.int8) - np.int8(8)
        decoded: Array = codes * self._spread(scales, shape)
        return decoded

    @staticmethod
    def _scales(array: Array) -> NDArray[np.float16]:
        missing = -array.shape[-1] % BLOCK
        padded = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array
        blocks = padded.reshape(*array.shape[:-1], padded.shape[-1] // BLOCK, BLOCK)
        return round_up_to_float16(np.abs(blocks).max(axis=-1, initial=0) / np.float32(INT4_MAX))

    @staticmethod
    def _spread(scales: Array, shape: Shape) -> Array:
        """The scale of each value."""
        return np.repeat(scales, BLOCK, axis=-1)[..., : shape[-1]]


def _divisors(scales: Array) -> Array:
    # If all values are zero, so is the scale; dividing by one instead keeps the codes zero.
    return np.where(scales > 0, scales, scales.dtype.type(1))

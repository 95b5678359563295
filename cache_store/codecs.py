"""Quantisers: how one array of targets becomes the named parts that are stored, and how far the way back may stray.

A codec makes values smaller by keeping less of them. Squeezing the parts further, without loss, is the shard's work.
Every codec states a worst-case error for each element, so cached training can be compared with online training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, np.dtype[Any]]]

FLOAT16_MAX = 65504.0
INT8_MAX = 127


class Codec(Protocol):
    """One way to store an array; instances hold no state."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """Shape and stored dtype of each part for an array of this shape and dtype; ValueError where unsupported."""
        ...

    def encode(self, array: Array) -> dict[str, Array]:
        """The parts of ``array``, as ``layout`` describes them; ValueError for values that the codec cannot hold."""
        ...

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """A fresh array [shape] from its parts; the parts may come flat."""
        ...

    def error_bound(self, array: Array) -> NDArray[np.float64]:
        """Worst-case |decoded - array| for each element, broadcastable to ``array``."""
        ...


class Exact:
    """Integers and floats as they are."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """One part, like the array."""
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise ValueError(f"codec 'exact' stores integers and floats of up to 8 bytes, not {dtype}")
        return {"values": (shape, _stored(dtype))}

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
        _require_float32("float16", dtype)
        return {"values": (shape, _stored(np.dtype(np.float16)))}

    def encode(self, array: Array) -> dict[str, Array]:
        """Rounded to nearest; ValueError for NaN, infinities and |x| > 65504, which float16 cannot hold."""
        _, dtype = self.layout(array.shape, array.dtype)["values"]
        _require_finite("float16", array)
        largest = np.abs(array).max(initial=0)
        if largest > FLOAT16_MAX:
            raise ValueError(
                f"codec 'float16' holds values up to {FLOAT16_MAX:.0f}, found {largest:g}: use 'exact' or 'int8-rows'"
            )
        return {"values": array.astype(dtype)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        return parts["values"].astype(np.float32).reshape(shape)

    def error_bound(self, array: Array) -> NDArray[np.float64]:
        """Half a unit in the last place: of the value where float16 is normal, of the smallest step below that."""
        return np.maximum(np.abs(array, dtype=np.float64) * 2.0**-11, 2.0**-25)


class Int8Rows:
    """float32 as symmetric int8 with one float32 scale for each vector along the last axis: an error of scale / 2."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """``codes`` like the array, ``scales`` without its last axis."""
        _require_float32("int8-rows", dtype)
        if not shape:
            raise ValueError("codec 'int8-rows' wants at least 1 dimension, found a scalar: use 'exact'")
        return {
            "codes": (shape, np.dtype(np.int8)),
            "scales": (shape[:-1], _stored(np.dtype(np.float32))),
        }

    def encode(self, array: Array) -> dict[str, Array]:
        """Rounded to nearest; ValueError for NaN and infinities."""
        _, dtype = self.layout(array.shape, array.dtype)["scales"]
        _require_finite("int8-rows", array)
        scales = self._scales(array)
        # A row of zeros has scale zero: dividing by one instead keeps its codes zero.
        codes = np.rint(array / np.where(scales > 0, scales, np.float32(1))[..., None])
        return {
            "codes": np.clip(codes, -INT8_MAX, INT8_MAX).astype(np.int8),
            "scales": scales.astype(dtype, copy=False),
        }

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        scales = parts["scales"].astype(np.float32, copy=False).reshape(shape[:-1])
        decoded: Array = parts["codes"].reshape(shape) * scales[..., None]
        return decoded

    def error_bound(self, array: Array) -> NDArray[np.float64]:
        """Half a step, plus what float32 adds when it rounds scale, quotient and product, subnormal scales included."""
        scales = self._scales(array).astype(np.float64)[..., None]
        return scales * (0.5 + INT8_MAX * 2.0**-22) + 2.0**-142

    @staticmethod
    def _scales(array: Array) -> NDArray[np.float32]:
        # Rounded down, so that 127 * scale never passes the largest value of the row, and so never overflows.
        exact = np.abs(array, dtype=np.float64).max(axis=-1, initial=0) / INT8_MAX
        scales = np.asarray(exact, dtype=np.float32)
        return np.where(scales > exact, np.nextafter(scales, np.float32(0)), scales)


CODECS: dict[str, Codec] = {"exact": Exact(), "float16": Float16(), "int8-rows": Int8Rows()}


def get_codec(name: str) -> Codec:
    """The codec called ``name``; ValueError that lists the known ones."""
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}: expected one of {', '.join(sorted(CODECS))}")
    return CODECS[name]


def _stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Little-endian on every machine, so that stored bytes can be compared."""
    return dtype.newbyteorder("<")


def _require_float32(codec: str, dtype: np.dtype[Any]) -> None:
    if dtype != np.float32:
        raise ValueError(f"codec {codec!r} stores float32, found {dtype}: convert first, or use 'exact'")


def _require_finite(codec: str, array: Array) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"codec {codec!r} stores finite values, found {np.sum(~np.isfinite(array))} NaN or infinite")

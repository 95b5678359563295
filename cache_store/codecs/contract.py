"""What every codec offers, and what they all check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, np.dtype[Any]]]

FLOAT16_MAX = 65504.0


class Codec(Protocol):
    """One way to store an array; instances hold no state but their settings."""

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """Shape and stored dtype of each part for an array of this shape and dtype; ValueError where unsupported.

        Zeros beyond the end of an axis are zeros beyond the end of the parts, and decode to zeros: so parts can be padded.
        """
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


def stored(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Little-endian on every machine, so that stored bytes can be compared."""
    return dtype.newbyteorder("<")


def require_float32(codec: str, dtype: np.dtype[Any]) -> None:
    """ValueError for any other dtype."""
    if dtype != np.float32:
        raise ValueError(f"codec {codec!r} stores float32, found {dtype}: convert first, or use 'exact'")


def require_rows(codec: str, shape: Shape) -> None:
    """ValueError for a scalar, which has no last axis to share a scale along."""
    if not shape:
        raise ValueError(f"codec {codec!r} wants at least 1 dimension, found a scalar: use 'exact'")


def require_finite(codec: str, array: Array) -> None:
    """ValueError for NaN and infinities."""
    if not np.isfinite(array).all():
        raise ValueError(f"codec {codec!r} stores finite values, found {np.sum(~np.isfinite(array))} NaN or infinite")


def require_at_most(codec: str, limit: float, array: Array) -> None:
    """ValueError where a value is beyond what the codec's float16 can hold."""
    largest = np.abs(array).max(initial=0)
    if largest > limit:
        raise ValueError(f"codec {codec!r} holds values up to {limit:.0f}, found {largest:g}: use 'exact' or 'int8-rows'")


def round_up_to_float16(values: Array) -> NDArray[np.float16]:
    """The next float16 that is no smaller; values of 0 to 65504."""
    nearest = np.asarray(values, np.float16)
    # Among floats of one sign the next bit pattern is the next number.
    bits = nearest.view(np.uint16) + (nearest < values)
    return np.asarray(bits, np.uint16).view(np.float16)

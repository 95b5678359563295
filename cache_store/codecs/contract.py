"""What every codec offers, and the checks that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from alignkd.errors import ConfigError

Array = NDArray[Any]
Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, np.dtype[Any]]]
"""Shape and stored dtype of each part, by the part's name."""

FLOAT16_MAX = 65504.0


class Codec(Protocol):
    """One way to store an array; an instance holds nothing but its settings.

    ConfigError for a dtype, shape or value that the codec cannot store.
    """

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """Shape and stored dtype of each part, for an array of this shape and dtype.

        An array padded with zeros at the end of an axis has parts that are padded with zeros at the end of theirs, and
        the other way round. So parts can be padded before they are decoded.
        """
        ...

    def encode(self, array: Array) -> dict[str, Array]:
        """The parts of ``array``, with the shapes and dtypes of ``layout``."""
        ...

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """A new array [shape] from its parts, which may be flat."""
        ...


def little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The stored form of a dtype: little-endian on every machine, so that stored bytes can be compared."""
    return dtype.newbyteorder("<")


def require_float32(codec: str, dtype: np.dtype[Any]) -> None:
    """ConfigError for any other dtype."""
    if dtype != np.float32:
        raise ConfigError(f"codec {codec!r} stores float32, found {dtype}: convert the array, or use 'exact'")


def require_rows(codec: str, shape: Shape) -> None:
    """ConfigError for a scalar: values along the last axis share a scale, and a scalar has no axis."""
    if not shape:
        raise ConfigError(f"codec {codec!r} needs at least 1 dimension, found a scalar: use 'exact'")


def require_finite(codec: str, array: Array) -> None:
    """ConfigError for NaN and infinities."""
    if not np.isfinite(array).all():
        raise ConfigError(f"codec {codec!r} stores finite values, found {np.sum(~np.isfinite(array))} NaN or infinite")


def require_at_most(codec: str, limit: float, array: Array) -> None:
    """ConfigError for values beyond what the codec's float16 can hold."""
    largest = np.abs(array).max(initial=0)
    if largest > limit:
        raise ConfigError(f"codec {codec!r} holds values up to {limit:.0f}, found {largest:g}: use 'exact' or 'int8-rows'")


def round_up_to_float16(values: Array) -> NDArray[np.float16]:
    """The smallest float16 that is not below each value; values from 0 to 65504."""
    nearest = np.asarray(values, np.float16)
    # Among floats of one sign the next bit pattern is the next number.
    bits = nearest.view(np.uint16) + (nearest < values)
    return np.asarray(bits, np.uint16).view(np.float16)

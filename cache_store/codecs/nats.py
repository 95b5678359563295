"""Gains in nats as one byte each, on a scale that is the same for every value: fine steps where most values are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.cache_store.codecs.contract import Array, Layout, Shape, require_finite, require_float32
from alignkd.errors import ConfigError

NATS_MAX = 32.0
"""The largest value that a code stands for."""
_LEVELS = 255


class Nats8:
    """float32 from 0 to 32 as codes of 8 bits: ``32 * (code / 255)^2``. There is no scale, so any values may be joined.

    Error: at most ``sqrt(32 * value) / 255 + 32 / 510^2`` (and the rounding of float32): 0.0001 at 0, 0.022 at 1, 0.126 at 32.
    Zeros stay zeros.
    """

    def layout(self, shape: Shape, dtype: np.dtype[Any]) -> Layout:
        """One part, ``codes``, with the shape of the array."""
        require_float32("nats8", dtype)
        return {"codes": (shape, np.dtype(np.uint8))}

    def encode(self, array: Array) -> dict[str, Array]:
        """Round the square roots to nearest.

        Raises:
            ConfigError: NaN, infinities, and values below 0 or above 32.
        """
        self.layout(array.shape, array.dtype)
        require_finite("nats8", array)
        least, most = array.min(initial=0), array.max(initial=0)
        if least < 0 or most > NATS_MAX:
            raise ConfigError(f"codec 'nats8' stores values from 0 to {NATS_MAX:g}, found {least:g} to {most:g}: use 'exact'")
        return {"codes": np.rint(np.sqrt(array / np.float32(NATS_MAX)) * np.float32(_LEVELS)).astype(np.uint8)}

    def decode(self, parts: Mapping[str, Array], shape: Shape) -> Array:
        """float32 [shape]."""
        codes = parts["codes"].reshape(shape)
        decoded: Array = np.square(codes, dtype=np.float32) * np.float32(NATS_MAX / _LEVELS**2)
        return decoded

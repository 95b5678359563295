"""4-bit codes, two per byte along the last axis: the first in the low half; the last of an odd number shares with a zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs.contract import Shape


def packed_shape(shape: Shape) -> Shape:
    """Shape of the bytes for codes [shape]."""
    return (*shape[:-1], (shape[-1] + 1) // 2)


def pack_nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes from 0 to 15 as bytes."""
    packed = codes[..., 0::2].copy()
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << 4
    return packed


def unpack_nibbles(packed: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Bytes, which may be flat, as codes [shape]."""
    packed = packed.reshape(packed_shape(shape))
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., : shape[-1]]

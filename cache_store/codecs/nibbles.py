"""Codes of four bits, two a byte along the last axis: the first in the low half, an odd last one beside a zero."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs.contract import Shape


def packed_shape(shape: Shape) -> Shape:
    """Shape of the bytes for codes [shape]."""
    return (*shape[:-1], (shape[-1] + 1) // 2)


def pack(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of 0 to 15 to bytes."""
    packed = codes[..., 0::2].copy()
    packed[..., : codes.shape[-1] // 2] |= codes[..., 1::2] << 4
    return packed


def unpack(packed: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Bytes, which may come flat, to codes [shape]."""
    packed = packed.reshape(packed_shape(shape))
    codes = np.stack([packed & 15, packed >> 4], axis=-1)
    return codes.reshape(*packed.shape[:-1], 2 * packed.shape[-1])[..., : shape[-1]]

"""The largest error that each codec states, element by element: what tests and benchmarks compare with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.codecs import Array, get_codec


def error_bound(codec: str, array: Array) -> NDArray[np.float64]:
    """Largest |decoded - array| for each element, broadcastable to ``array``, the rounding of float32 included."""
    if codec == "exact":
        return np.zeros((1,) * array.ndim)
    if codec == "float16":
        return np.maximum(np.abs(array, dtype=np.float64) * 2.0**-11, 2.0**-25)
    if codec == "nats8":
        # As its docstring says, and the rounding of root, product and square.
        wide = array.astype(np.float64)
        return np.sqrt(32 * wide) / 255 + 32 / 510**2 + (wide + 1e-3) * 2.0**-20
    scales = get_codec(codec).encode(array)["scales"].astype(np.float64)
    if codec == "int8-rows":
        # Scale, quotient and product are rounded, subnormal scales too.
        return scales[..., None] * (0.5 + 127 * 2.0**-22) + 2.0**-142
    if codec == "int4-blocks":
        # The quotient is rounded, or a scale that is too small becomes zero.
        return np.repeat(scales, 64, axis=-1)[..., : array.shape[-1]] * (0.5 + 7 * 2.0**-22) + 2.0**-147
    levels = {"sqrt8": 255, "sqrt4": 15}[codec]
    steps = scales[..., None] / levels**2
    roots = np.sqrt(array / np.where(steps > 0, steps, 1))
    # Half a step of the square roots.
    half = 0.5 + levels * 2.0**-22
    return steps * half * (2 * roots + half) + array * 2.0**-21

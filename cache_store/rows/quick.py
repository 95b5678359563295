"""The shortest proof that one value of a field is possible; where it fails, the checks of the field say what is wrong.

A reader that decompresses row by row has tens of microseconds for each. So for most rows it compares only what would do harm:
numbers that are not finite, scales, probabilities above 1, ranks beyond the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from alignkd.cache_store.codecs import Array, Shape
from alignkd.cache_store.rows.kinds import Sizes, is_attention
from alignkd.cache_store.rows.ranges import LOWEST_CODE, LOWEST_TAIL
from alignkd.cache_store.rows.values import SLACK

Quick = Callable[[Mapping[str, Array], Shape], bool]

_ONE = int(np.array(1 + SLACK, np.float16).view(np.uint16))
_INFINITE = 0x7C00
_SIGN = 0x8000
_EMPTY_TAIL = int(np.array(-LOWEST_TAIL, np.float16).view(np.uint16))


def quick_of(name: str, codec: str, sizes: Sizes) -> Quick | None:
    """Whether the parts of a value, of a shape, are possible; None where only the checks can say."""
    if name in ("topk_rank_steps", "draw_rank_steps") and sizes.ids is not None:
        ids = sizes.ids
        return lambda parts, shape: not parts["values"].size or _last_rank(parts["values"], shape) < ids
    if name in ("topk_logprob_codes", "draw_logprob_codes"):
        return lambda parts, _: int(parts["values"].max(initial=0)) <= LOWEST_CODE
    if name == "sketch" or codec == "nats8":  # every code is possible
        return lambda parts, _: True
    if name == "tail_logmass" and codec == "float16":
        # The bits of 16-bit floats of one sign are in the order of their sizes.
        return lambda parts, _: int((parts["values"].view(np.uint16) ^ _SIGN).max(initial=0)) <= _EMPTY_TAIL
    if codec in ("sqrt8", "sqrt4", "int4-blocks"):
        most = _ONE if is_attention(name) else _INFINITE - 1
        return lambda parts, _: int(parts["scales"].view(np.uint16).max(initial=0)) <= most
    return None


def _last_rank(steps: Array, shape: Shape) -> int:
    return int(steps.reshape(shape).sum(axis=1, dtype=np.uint32 if steps.itemsize == 2 else np.uint64).max())

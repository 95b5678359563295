"""Encoded values to check, and what a check says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignkd.cache_store.codecs import Array

SLACK = 0.01
"""What bounds leave beside the codec's error: for arithmetic in 16 bits."""


class Values(NamedTuple):
    """Encoded values of one field, one after the other: each begins at ``offsets[part]`` in the flat ``parts[part]``."""

    codec: str
    shapes: Sequence[tuple[int, ...]]
    parts: Mapping[str, Array]
    offsets: Mapping[str, Sequence[int]]
    stride: int = 1
    """Sums are formed of each such row only: 1 for all."""

    def holding(self, part: str, element: int) -> int:
        """The number of the value that an element of a part belongs to."""
        return int(np.searchsorted(self.offsets[part], element, side="right")) - 1


Found = tuple[int, str] | None
"""None, or the number of the first value that is impossible and what is wrong with it."""
Check = Callable[[Values], Found]

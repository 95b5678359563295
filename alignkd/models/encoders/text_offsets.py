"""Which characters of a text each id covers, by any tokenizer that can tell.

Shapes: L ids.
"""

from typing import Any

import numpy as np


def text_offsets(tokenizer: Any, text: str) -> np.ndarray | None:
    """First and last character (exclusive) of each id of ``tokenizer(text)``, ``[L, 2]``; None where it cannot tell."""
    if hasattr(tokenizer, "chunk_offsets"):
        try:
            offsets_L2: np.ndarray = tokenizer.chunk_offsets(text)
        except ValueError:
            return None
        return offsets_L2
    if not tokenizer.is_fast:
        return None
    found = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return np.asarray(found, dtype=np.int64).reshape(-1, 2)

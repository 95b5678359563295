"""Token ids of a text, and which characters each id covers, by any tokenizer that can say.

Shapes: L ids.
"""

from typing import Any

import numpy as np


def tokenise(tokenizer: Any, text: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Ids ``[L]`` of ``tokenizer(text)`` and their offsets (:func:`text_offsets`); splits the text once."""
    if hasattr(tokenizer, "encode_chunk"):  # it remembers its chunks
        return np.asarray(tokenizer.encode_chunk(text), dtype=np.int64), text_offsets(tokenizer, text)
    if not tokenizer.is_fast:
        return np.asarray(tokenizer(text).input_ids, dtype=np.int64), None
    found = tokenizer(text, return_offsets_mapping=True)
    return np.asarray(found["input_ids"], dtype=np.int64), _offsets(found)


def text_offsets(tokenizer: Any, text: str) -> np.ndarray | None:
    """First and last character (exclusive) of each id of ``tokenizer(text)``, ``[L, 2]``; None where it cannot say."""
    if hasattr(tokenizer, "chunk_offsets"):
        try:
            offsets_L2: np.ndarray = tokenizer.chunk_offsets(text)
        except ValueError:
            return None
        return offsets_L2
    return _offsets(tokenizer(text, return_offsets_mapping=True)) if tokenizer.is_fast else None


def _offsets(found: Any) -> np.ndarray:
    return np.asarray(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)

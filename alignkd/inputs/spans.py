"""Which characters of a conversation a token stands for, whatever the template and the tokenizer.

Characters are counted over the conversation's own text, turn after turn, without white space and without image tags: templates
add, move and strip these. A token of the template's own text stands for none: an empty span, where the next would begin.

Shapes: L ids, C characters of a text.
"""

import re
from collections.abc import Iterable

import numpy as np

from alignkd.inputs.prompts import IMAGE_TAG, Part

NO_SPANS = np.zeros((0, 2), dtype=np.int32)
"""Of an input whose encoder gives no spans."""

_WORD_START = "\u2581"
"""SentencePiece cannot tell it from a space."""


def counted(text: str) -> np.ndarray:
    """Which characters of a conversation's text count, ``[C]`` of bool."""
    found_C = np.fromiter((not c.isspace() and c != _WORD_START for c in text), dtype=bool, count=len(text))
    for tag in re.finditer(IMAGE_TAG, text):
        found_C[tag.start() : tag.end()] = False
    return found_C


def places(parts: Iterable[Part], before: int = 0) -> np.ndarray:
    """How many counted characters lie before each place of the parts' joined text, ``[C + 1]``; ``before`` it: left out."""
    flags = [counted(text) if own else np.zeros(len(text), dtype=bool) for text, own in parts]
    return np.concatenate([[before], before + np.concatenate(flags or [np.zeros(0, bool)]).cumsum()]).astype(np.int32)

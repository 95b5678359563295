"""Which characters of a conversation a token stands for, whatever the template and the tokenizer.

Characters are counted over the text of the conversation, turn after turn, without white space and image tags, which templates
add, move and strip. A token of the template's text stands for no characters: it has an empty span, where the next one begins.

Shapes: L ids, C characters of a text.
"""

import re
from collections.abc import Iterable

import numpy as np

from alignkd.inputs.prompts import IMAGE_TAG, Part

NO_SPANS = np.zeros((0, 2), dtype=np.int32)
"""The spans of an input whose encoder gives none."""

_WORD_START = "\u2581"
"""The character that SentencePiece writes for a space."""


def counted(text: str) -> np.ndarray:
    """Which characters of a conversation's text count, ``[C]`` of bool."""
    found_C = np.fromiter((not c.isspace() and c != _WORD_START for c in text), dtype=bool, count=len(text))
    for tag in re.finditer(IMAGE_TAG, text):
        found_C[tag.start() : tag.end()] = False
    return found_C


def places(parts: Iterable[Part], skipped: int = 0) -> np.ndarray:
    """How many characters count before each position of the parts' joined text, ``[C + 1]``, ``skipped`` others included."""
    flags = [counted(text) if own else np.zeros(len(text), dtype=bool) for text, own in parts]
    return np.concatenate([[skipped], skipped + np.concatenate(flags or [np.zeros(0, bool)]).cumsum()]).astype(np.int32)

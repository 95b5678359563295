"""Texts as arrays of code points, and tracers: characters that stand for one position of one text each.

Shapes: C characters of a text.
"""

import re

import numpy as np

FIRST_TRACER = 0x40000
"""Planes 4 to 16: no template writes such characters, and no template takes them for white space or for letters."""
MOST_TRACERS = 0x110000 - FIRST_TRACER

_IS_SPACE = np.array([chr(code).isspace() for code in range(0x3001)] + [False])


def codes(text: str) -> np.ndarray:
    """Code points ``[C]``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


def text_of(codes_C: np.ndarray) -> str:
    """The text of code points."""
    return codes_C.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")


def is_space(codes_C: np.ndarray) -> np.ndarray:
    """Which characters ``str.strip`` takes off, ``[C]`` of bool."""
    found_C: np.ndarray = _IS_SPACE[np.minimum(codes_C, len(_IS_SPACE) - 1)]
    return found_C


def traced(text: str, first: int, kept: re.Pattern[str] | None) -> tuple[str, np.ndarray]:
    """A text with tracers from number ``first`` on for all characters but white space and what ``kept`` finds.

    Also which characters are traced, ``[C]`` of bool.
    """
    codes_C = codes(text)
    traced_C = ~is_space(codes_C)
    for match in kept.finditer(text) if kept else ():
        traced_C[match.start() : match.end()] = False
    return text_of(np.where(traced_C, FIRST_TRACER + first + np.arange(len(codes_C)), codes_C)), traced_C

"""Why samples are rejected, in a few classes: they are counted by class, and tried again by class.

A reason is text. One that begins with the name of a class and a colon belongs to it; the others are recognised by what the
library or alignkd says in them, so that the records of every version can be counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

NOT_FINITE = "not finite"
OUT_OF_MEMORY = "out of memory"

_TEXT = "text"
_PATTERNS = {
    "image missing": r"image .*(No such file or directory|Not a directory|Is a directory)",
    "image too large": r"image .*(bytes|pixels), more than",
    "image outside": r"image .*(lies outside|cannot be a file)",
    "image damaged": r"image ",
    "too long": r".*(lies beyond the maximum length|no supervised token within)",
    OUT_OF_MEMORY: r".*do not fit into memory",
    NOT_FINITE: r".*(not finite|NaN or infinit)",
    "record": r"(its )?record ",
}
"""How the reasons of each class read, where they do not begin with its name. Anything else is about the text."""

REASONS = (*_PATTERNS, _TEXT)
"""The classes, in the order in which a reason is compared with them."""


def reason_class(reason: str) -> str:
    """The class of a reason, one of :data:`REASONS`."""
    named = reason.partition(":")[0]
    if named in REASONS:
        return named
    return next((name for name, pattern in _PATTERNS.items() if re.match(pattern, reason, re.DOTALL)), _TEXT)


def count_reasons(reasons: Iterable[str]) -> dict[str, int]:
    """How many reasons belong to each class that occurs, the most frequent first."""
    return dict(Counter(map(reason_class, reasons)).most_common())


def in_words(counts: dict[str, int]) -> str:
    """Counts of classes for a message: ``101 image missing, 3 text``."""
    return ", ".join(f"{count:,} {name}" for name, count in counts.items()) or "none"

"""Which option an answer to MMBench means, without a judge.

Sources of the rules: OpenCompass, ``tools/eval_mmbench.py`` (a letter, then an option's text); lmms-eval, ``mcq_extract.py``
(whatever letter stands somewhere).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

LETTERS = "ABCDE"
"""E means that no option fits."""

_FORMS = (
    *(("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)
"""What stands before and after a letter, in the order in which forms are tried."""
_NO_JUDGE = "Failed to obtain answer via API"
"""In an answer, no letter is looked for."""
_PHRASES = (
    *map("".join, product(("the ", ""), ("", "correct ", "best "), ("answer is",))),
    *map("".join, product(("the ", ""), ("correct ", "best "), ("option is",))),
    *map("".join, product(("the ", ""), ("", "correct "), ("choice is",))),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def letter_or_option(answer: str, options: Mapping[str, str]) -> str:
    """The letter that stands in an answer, or that of the one option contained in it; empty where neither is clear."""
    return _letter(answer) or _contained(answer, options)


def _letter(answer: str) -> str:
    if _NO_JUDGE in answer:
        return ""
    words = answer.split()
    alone = [letter for letter in LETTERS if letter in words]
    # In a longer answer, "A" may be the article.
    if len(alone) == 1 and not (alone == ["A"] and len(words) > 3):
        return alone[0]
    for before, after in _FORMS:
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        if len(found) == 1:
            return found[0]
    return ""


def _contained(answer: str, options: Mapping[str, str]) -> str:
    found = [letter for letter, option in options.items() if option.lower() in answer.lower()]
    return found[0] if len(found) == 1 else ""


def likeliest_letter(answer: str, letters: Sequence[str]) -> str:
    """One of ``letters`` that stands in an answer in some form: the surest form wins, then the last; empty where none does."""
    text = answer.strip()
    for mark in ",.!?;:'\"":
        text = text.strip(mark)
    if not text:
        return ""
    found = [(*place, letter) for letter in letters for place in _places(f" {text} ", letter)]
    if not found:
        found = [(0, f" {text} ".rfind(letter), letter) for letter in letters if letter in text]
    return max(found)[2] if found else ""


def _places(text: str, letter: str) -> Iterator[tuple[int, int]]:
    """How sure each form is in which the letter stands, and where it stands; the text has a space at both ends."""
    for sureness, form in ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"), (2, f"{letter} ")):
        if form in text:
            yield sureness, text.rfind(form)
    lower = text.lower()
    for phrase in _PHRASES:
        if (start := lower.find(phrase)) >= 0 and (place := text.find(letter, start + len(phrase))) >= 0:
            yield 7, place
    inner = text.strip()
    if inner.startswith(letter) and not inner[1:2].isalpha():
        yield 10, 0
    if inner.endswith(letter) and not inner[-2:-1].isalpha():
        yield 9, len(text) - 1

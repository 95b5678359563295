"""Answers made comparable as the VQA evaluation does it, and what an answer is worth beside those of ten people.

There are two variants: that of TextVQA (``m4c_evaluator.py`` of LLaVA and MobileVLM, ``EvalAIAnswerProcessor``), which first
takes commas, question marks and the possessive out, and that of VQAv2 (``vqaEval.py``), which does not.
"""

import re

from alignkd.pipeline.evaluate.benchmarks.shared.contractions import CONTRACTIONS

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = ("a", "an", "the")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MOST_FULL_STOPS = 32
"""The references pass a flag of that value where the number of replacements is expected."""


def m4c_text(text: str) -> str:
    """An answer in TextVQA's normal form."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_text(text)


def vqa_text(text: str) -> str:
    """An answer in VQAv2's normal form."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    plain, has_number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_space or has_number else " ")
    plain = _FULL_STOP.sub("", plain, count=_MOST_FULL_STOPS)
    words = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def agreement(matches: int, people: int) -> float:
    """What an answer is worth that ``matches`` of ``people`` gave: the mean over leaving each of them out, 3 others suffice."""
    left_out, others = min(1.0, max(matches - 1, 0) / 3), min(1.0, matches / 3)
    return (matches * left_out + (people - matches) * others) / people

"""Which decoder layers a recipe compares, in words or by number, and which layer of the teacher each one meets.

Layers count from 0. ``middle`` is the stretch from a third to three fifths of the depth, the layers that CompoDistill
(arXiv 2510.12184) aligns: 8 to 14 of 24, 13 to 23 of 40.
"""

import re

_WORDS = ("first", "last", "middle", "all")
_NUMBERS = re.compile(r"\d+(,\d+)*")
EXPECTED = f"{', '.join(_WORDS)}, or layers such as 0,5,11"


def check_layers(text: str) -> None:
    """Refuse what names no layers.

    Raises:
        ValueError: says what was expected.
    """
    if text in _WORDS:
        return
    if not _NUMBERS.fullmatch(text):
        raise ValueError(f"{text!r} names no layers, expected {EXPECTED}")
    numbers = text.split(",")
    if len(set(map(int, numbers))) < len(numbers):
        raise ValueError(f"{text!r} names a layer twice")


def find_layers(text: str, depth: int) -> tuple[int, ...]:
    """The layers that the words mean in a model of ``depth`` layers, in order.

    Raises:
        ValueError: they mean none, or one that it does not have.
    """
    check_layers(text)
    last = depth - 1
    named = {
        "first": range(1),
        "last": range(last, depth),
        "middle": range(_rounded(last, 3), _rounded(3 * last, 5) + 1),
        "all": range(depth),
    }
    layers = tuple(named[text]) if text in named else tuple(sorted(int(number) for number in text.split(",")))
    if layers[-1] > last:
        raise ValueError(f"layer {layers[-1]} is wanted, but there are {depth}: 0 to {last}")
    return layers


def find_teacher_layers(text: str, depth: int) -> tuple[int, ...]:
    """As :func:`find_layers`; ``WORDS@N`` are the layers that those of a student of N layers meet.

    Raises:
        ValueError: as there.
    """
    words, at, student = text.partition("@")
    if not at:
        return find_layers(words, depth)
    if not student.isdigit() or int(student) < 1:
        raise ValueError(f"{text!r}: after @ stand the layers of the student, such as {words}@24")
    return tuple(sorted({matching_teacher_layer(layer, int(student), depth) for layer in find_layers(words, int(student))}))


def matching_teacher_layer(layer: int, depth: int, teacher_depth: int) -> int:
    """The layer of a teacher that a layer of a student of ``depth`` layers meets.

    At the same relative depth, rounded (half up): the first meets the first, the last meets the last.
    """
    return _rounded(layer * (teacher_depth - 1), max(depth - 1, 1))


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)

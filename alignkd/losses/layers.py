"""Which decoder layers a recipe compares, in words or by number, and which layer of the teacher matches each one.

Layers count from 0. ``middle`` are the layers from a third to three fifths of the depth, which CompoDistill (arXiv 2510.12184)
compares: 8 to 14 of 24, 13 to 23 of 40.
"""

import re

from alignkd.errors import ConfigError

_WORDS = ("first", "last", "middle", "all")
_NUMBERS = re.compile(r"\d+(,\d+)*")
EXPECTED = f"{', '.join(_WORDS)}, or layers such as 0,5,11"


def check_layers(text: str) -> None:
    """Refuse a text that does not name layers.

    Raises:
        ConfigError: says what is expected.
    """
    if text in _WORDS:
        return
    if not _NUMBERS.fullmatch(text):
        raise ConfigError(f"{text!r} names no layers, expected {EXPECTED}")
    numbers = text.split(",")
    if len(set(map(int, numbers))) < len(numbers):
        raise ConfigError(f"{text!r} names a layer twice")


def find_layers(text: str, depth: int) -> tuple[int, ...]:
    """The layers that the text names in a model of ``depth`` layers, in order.

    Raises:
        ConfigError: it names none, or one that the model does not have.
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
        raise ConfigError(f"layer {layers[-1]} is wanted, but there are {depth}: 0 to {last}")
    return layers


def find_teacher_layers(text: str, depth: int) -> tuple[int, ...]:
    """As :func:`find_layers`; ``WORDS@N`` are the layers that match those of a student of N layers.

    Raises:
        ConfigError: as there.
    """
    words, at, student = text.partition("@")
    if not at:
        return find_layers(words, depth)
    if not student.isdigit() or int(student) < 1:
        raise ConfigError(f"{text!r}: expected the student's number of layers after @, such as {words}@24")
    return tuple(sorted({matching_teacher_layer(layer, int(student), depth) for layer in find_layers(words, int(student))}))


def matching_teacher_layer(layer: int, depth: int, teacher_depth: int) -> int:
    """The layer of a teacher that matches a layer of a student of ``depth`` layers.

    At the same relative depth, rounded (half up): the first matches the first, the last matches the last.
    """
    return _rounded(layer * (teacher_depth - 1), max(depth - 1, 1))


def _rounded(numerator: int, denominator: int) -> int:
    return (2 * numerator + denominator) // (2 * denominator)

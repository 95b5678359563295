"""How large a value is that a template made, or is about to make."""

import re
from typing import Any

from jinja2.exceptions import TemplateError

_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{5,}|\*)|\{[^{}]*:[^{}]*(\d{5,}|\{)")
_MOST_COUNTED = 2**24


class TemplateLimitError(TemplateError):
    """A template does more work, makes larger texts or takes longer than any chat template needs."""


def size(value: Any, largest: int) -> int:
    """Characters of a value as text, about; counting ends above ``largest``."""
    if isinstance(value, str):
        return len(value)
    total, left = 0, [value]
    while left and total <= largest:
        one = left.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            left += [*one.keys(), *one.values()]
            total += 1
        elif isinstance(one, list | tuple | set | frozenset):
            left += one
            total += 1
        else:
            total += 1
    return total


def grown(name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """At least how many characters a filter or a text's method makes, where that is more than it was given."""
    given = [*args, *kwargs.values()]
    widest = max((abs(number) for number in given if isinstance(number, int | float)), default=0)
    text = value if isinstance(value, str) else ""
    if name == "replace" and len(given) >= 2:
        times = text.count(str(given[0])) if str(given[0]) else len(text) + 1
        return float(times) * len(str(given[1]))
    if name == "join":
        parts = given[0] if isinstance(value, str) and args and not isinstance(args[0], str) else value
        between = value if parts is not value else given[0] if given else ""
        count = len(parts) if hasattr(parts, "__len__") else 0
        return size(parts, _MOST_COUNTED) + count * len(str(between))
    if name in ("indent", "expandtabs", "wordwrap"):
        width = max([widest, 8, *(len(part) for part in given if isinstance(part, str))])
        return float(width) * (text.count("\n") + text.count("\t") + 1)
    if name == "format":
        return formatted(text, args, kwargs)
    if name in ("default", "d", "int", "float", "sum", "min", "max", "map", "select", "reject", "selectattr", "rejectattr"):
        return 0.0
    return float(widest)


def formatted(text: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Characters of a formatted text, at most; TemplateLimitError for a width that is very large or computed."""
    if not isinstance(text, str) or _WIDE_FORMAT.search(text):
        raise TemplateLimitError("it formats a text to a very large or computed width")
    return float(text.count("{") + text.count("%")) * size([*args, *kwargs.values()], _MOST_COUNTED)


def operated(operator: str, left: Any, right: Any, largest: int) -> float:
    """Characters of what an operator makes, about."""
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if operator == "%":
        return formatted(left, (right,), {}) if isinstance(left, str) else 0.0
    if operator == "**":
        return float(abs(left).bit_length() * abs(right)) if isinstance(left, int) and isinstance(right, int) else 1.0
    if numbers:
        return float(max(int(n).bit_length() for n in (left, right) if isinstance(n, int))) if isinstance(left, int) else 1.0
    if operator == "*":
        times, repeated = (left, right) if isinstance(left, int) else (right, left)
        return float(times) * size(repeated, largest) if isinstance(times, int) else 1.0
    return float(size(left, largest)) + size(right, largest)

"""Figures in words: times, sizes, and parts that add up to their total as they are printed."""

import math
from collections.abc import Sequence
from fractions import Fraction


def adding_up(parts: Sequence[float], digits: int) -> tuple[list[str], str]:
    """Parts and their sum with so many digits after the point, such that the printed parts add up to the printed sum.

    Each part is rounded down or up (largest remainders up), the sum to the nearest.
    """
    unit = 10**digits
    exact = [Fraction(part) * unit for part in parts]
    total = round(sum(exact))
    down = [part.__floor__() for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda place: (down[place] - exact[place], place))
    for place in by_rest[: total - sum(down)]:
        down[place] += 1
    return [fixed(part, digits) for part in down], fixed(total, digits)


def fixed(units: int, digits: int) -> str:
    """A number of units of the last digit, as it is printed: 12345 with two digits is ``123.45``."""
    sign, units = ("-" if units < 0 else ""), abs(units)
    return f"{sign}{units // 10**digits:,}" + (f".{units % 10**digits:0{digits}d}" if digits else "")


def duration(seconds: float) -> str:
    """A time in its two largest units: ``3 h 20 min``; a dash for what is no time."""
    if not 0 <= seconds < math.inf:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    for unit, length, smaller, part in (("d", 86_400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {smaller}"
    raise AssertionError


def percent(share: float, digits: int = 1) -> str:
    """A share as per cent; one that rounds to zero has no sign."""
    value = round(100 * share, digits)
    return f"{value if value else 0.0:.{digits}f} %"


def figure(value: object) -> str:
    """A number to four digits, a dash where there is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def short(text: object, most: int = 300) -> str:
    """A text, cut where it is longer than this."""
    text = str(text)
    return text if len(text) <= most else f"{text[: most - 1]}…"

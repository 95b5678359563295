"""A benchmark's result in lines for people: the figure that papers print, what to know of it, then every metric."""

from collections.abc import Iterator, Mapping
from typing import Any

from alignkd.pipeline.runtime.printable import printable


def score_text(result: Mapping[str, Any]) -> str:
    """The figure and its notes, as ``alignkd benchmark run`` prints them."""
    unit = "%" if result["unit"] == "percent" else "points"
    figure = f"{result['title']:<14} {result['score']:9.2f} {unit:<6}  {result['questions']:,} questions, {result['protocol']}"
    return "\n".join([figure, *(f"  {note}" for note in result["notes"])])


def metrics_text(result: Mapping[str, Any]) -> str:
    """Answers, settings and all metrics, one a line; what is broken down has a line for each part."""
    answered = {"answered": result["answered"]} if result["answered"] < result["questions"] else {}
    return "\n".join(_lines({**answered, **result["settings"], **result["metrics"]}, "  "))


def _lines(figures: Mapping[str, Any], indent: str) -> Iterator[str]:
    width = max((len(printable(name)) for name in figures), default=0)
    for name, value in figures.items():
        if isinstance(value, dict) and len(indent) == 2:
            yield f"{indent}{printable(name)}"
            yield from _lines(value, f"{indent}  ")
        else:
            yield f"{indent}{printable(name):<{width}}  {_words(value)}"


def _words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return ", ".join(f"{printable(name)} {_words(part)}" for name, part in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else printable(value)

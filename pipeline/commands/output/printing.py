"""Figures on standard output: aligned text for people, JSON for programs."""

from typing import Any

import click

from alignkd.pipeline.runtime.printable import json_text, printable, printable_lines
from alignkd.pipeline.runtime.redact import redacted_text


def say(text: object) -> None:
    """Print text of one or several lines on standard output; hidden characters in it are shown escaped."""
    click.echo(printable_lines(text))


def say_json(value: Any) -> None:
    """Print one line of JSON on standard output."""
    click.echo(json_text(value))


def without_credentials(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures whose ``cache`` is a URL that may be shown."""
    return {**figures, "cache": redacted_text(str(figures["cache"]))} if "cache" in figures else figures


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """Print one figure per line, or all as one JSON object."""
    figures = without_credentials(figures)
    if as_json:
        say_json(figures)
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        click.echo(printable(f"{name.replace('_', ' '):<{width}}  {_words(name, value)}"))


def _words(name: str, value: Any) -> str:
    if value is None:
        return "not known"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(name, item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return "; ".join(_words("", item) for item in value) or "none"
    if "bytes" in name and isinstance(value, int | float):
        return size_words(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def size_words(count: float) -> str:
    """A number of bytes in its largest unit: ``1.5 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.1f} {unit}" if unit != "B" else f"{count:,.0f} B"
        count /= 1000
    return f"{count:,.1f} TB"

"""Text of a card: names instead of paths, tables whose cells mean nothing in Markdown or HTML."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from alignkd.pipeline.hub.names import parse_name
from alignkd.pipeline.runtime.printable import printable
from alignkd.pipeline.runtime.redact import redacted_text

_GENERAL = ("student", "student-official")
"""Names that say nothing without the folder that they are in."""
_HOMES = ("home", "Users")
"""Folders whose folders are named after people."""
_LONGEST = 300


def short_name(text: str) -> str:
    """The name in a path or a URL, with the folder before it where it says little; a pinned name of a model stays whole."""
    name = parse_name(text)
    if name is not None and name.is_pinned:  # as records keep it; without a commit it may be a path
        return text
    path = text.replace("\\", "/")
    parts = PurePosixPath(path.partition("://")[2] or path).parts
    with_folder = len(parts) > 1 and parts[-1] in _GENERAL and not (len(parts) > 2 and parts[-3] in _HOMES)
    kept = parts[-2:] if with_folder else parts[-1:]
    return "/".join(part for part in kept if part != "/") or "unnamed"


def cell(value: object) -> str:
    """A text on one line in which Markdown and HTML mean nothing, without credentials."""
    safe = html.escape(printable(redacted_text(str(value)[:_LONGEST])), quote=False)
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", safe)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of Markdown; empty where it has no rows."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *([cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(facts: Mapping[str, str]) -> str:
    """One line for each fact."""
    return "\n".join(f"* {name}: {cell(value)}" for name, value in facts.items())


def licence_in(card: str) -> str | None:
    """The licence that the head of a card states, which its user may have filled in; None where it states none."""
    import yaml

    head = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    licence = found.get("license") if isinstance(found, dict) else None
    return licence if isinstance(licence, str) and licence else None

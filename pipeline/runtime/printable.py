"""Text from others, safe to show: no character of it moves a cursor, turns the reading direction or forges a line.

Ids, file names, templates and messages of libraries come from people we do not know. They are stored as they came, and shown
through this module: on the terminal, in the log, in HTML and on figures.
"""

import html
import json
import re
import unicodedata
from typing import Any

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Control and format characters (such as overrides of the reading direction), halves of surrogate pairs, line separators."""

_WORD_FORMING = "\u200c\u200d"
"""Joiners, which Persian, Hindi and emoji need inside words."""

_CANDIDATES = re.compile(r"[^ -~]")
_HIDDEN_IN_JSON = re.compile(r"[^\n -~]")


def printable(text: object, *, keep: str = "") -> str:
    r"""A text on one line, its hidden characters as ``\xNN``, ``\uNNNN`` or ``\UNNNNNNNN``; those in ``keep`` stay."""
    return _CANDIDATES.sub(lambda found: _escaped(found[0], keep), str(text))


def printable_lines(text: object, *, indent: str = "") -> str:
    """A text of several lines, each printable; ``indent`` begins all but the first, so that none can be taken for another's."""
    return f"\n{indent}".join(printable(line, keep="\t") for line in str(text).split("\n"))


def html_text(text: object) -> str:
    """A text for HTML, in an element or in a quoted attribute."""
    return html.escape(printable_lines(text))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """JSON that people can read: letters of all languages as they are, hidden characters in JSON's own escapes.

    Any string survives, halves of surrogate pairs too. Without ``indent`` it is one line, whatever a reader takes for the end
    of one.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent, default=str)
    return _HIDDEN_IN_JSON.sub(lambda found: found[0] if _is_shown(found[0]) else _json_escape(found[0]), text)


def _json_escape(character: str) -> str:
    return "\\u007f" if character == "\x7f" else json.dumps(character)[1:-1]


def _is_shown(character: str) -> bool:
    return character in _WORD_FORMING or unicodedata.category(character) not in _HIDDEN


def _escaped(character: str, keep: str) -> str:
    if character in keep or _is_shown(character):
        return character
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"

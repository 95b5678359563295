"""The records of a data file, a JSON list or JSON lines: where each begins and ends, without holding the file in memory.

A record that cannot be decoded does not hide the others: a line ends at its line break, and the end of a value in a list is
found by its brackets. Only a list whose syntax is broken cannot be read on.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from alignkd.errors import DataError

CHUNK = 4 * 2**20
LARGEST_RECORD = 64 * 2**20
"""A record of more bytes is rejected; only its first :data:`KEPT` bytes are read."""
KEPT = 2**16
_BETWEEN = re.compile(r"[ \t\r\n]*(?P<comma>,?)[ \t\r\n]*(?P<end>\]?)")
_STRUCTURE = re.compile(r'"|[\[{]+|[\]}]+')
_IN_TEXT = re.compile(r'["\\]')
_SCALAR = re.compile(r"[^,\]\s]*")
_CUT = 16
"""An error that lies so near to the end of what was read may come from the cut: no word or escape of JSON is longer."""


class Record(NamedTuple):
    """A record's place in the file, its text (cut after :data:`KEPT` bytes where it is too large), and its value.

    ``value`` is None where it was not decoded.
    """

    start: int
    length: int
    text: bytes
    value: Any = None


def read_records(file: BinaryIO, path: object) -> Iterator[Record]:
    """The records of an opened file.

    Raises:
        DataError: it is no JSON list and no JSON lines, or the list's syntax is broken.
    """
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    file.seek(start)
    first = file.read(CHUNK).lstrip()[:1]
    file.seek(start)
    expected = "expected a JSON list or JSON lines of LLaVA or messages samples"
    if first == b"[":
        yield from _list_records(file, path, start)
    elif first == b"{":
        yield from _line_records(file, start)
    elif first == b"":
        raise DataError(f"data file {path} is empty, {expected}")
    else:
        raise DataError(f"data file {path} begins with {first!r}, {expected}")


def _line_records(file: BinaryIO, start: int) -> Iterator[Record]:
    while line := file.readline(LARGEST_RECORD + 1):
        text, length = line, len(line)
        if length > LARGEST_RECORD:
            text = line[:KEPT]
            while not line.endswith(b"\n") and (line := file.readline(CHUNK)):
                length += len(line)
        if text.strip():
            yield Record(start, length, text)
        start += length


def _list_records(file: BinaryIO, path: object, offset: int) -> Iterator[Record]:
    # Latin-1 maps each byte to one character, so positions in the text are byte offsets; JSON's own syntax is ASCII.
    decoder = json.JSONDecoder()
    text = file.read(CHUNK).decode("latin-1")
    position, separator = text.index("[") + 1, ""
    while True:
        match = _BETWEEN.match(text, position)
        assert match is not None
        start = match.end()
        if match["end"] and not match["comma"]:
            _refuse_more(path, offset + start, [text[start:].encode("latin-1")])
            _refuse_more(path, offset + start, iter(lambda: file.read(CHUNK), b""))
            return
        value, end, whole = None, len(text), False
        if start < len(text):
            if match["comma"] != separator:
                raise DataError(
                    f"data file {path}: not a JSON list: a comma is missing or too many at byte {offset + position}"
                )
            try:
                value, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                if error.pos < len(text) - _CUT and not error.msg.startswith("Unterminated"):
                    raise _broken(path, offset + start, f"{error.msg} at byte {offset + error.pos}") from error
            except (ValueError, RecursionError):  # JSON that Python does not decode: nested too deeply, or too long a number
                whole = True
        if end < len(text):
            record = text[start:end]
            yield Record(offset + start, end - start, record.encode("latin-1"), value if record.isascii() else None)
            position, separator = end, ","
        elif whole or len(text) - position > LARGEST_RECORD:
            length, record, text = _to_its_end(file, path, text[start:], offset + start)
            yield Record(offset + start, length, record.encode("latin-1"))
            offset, position, separator = offset + start + length, 0, ","
        else:
            more = file.read(CHUNK).decode("latin-1")
            if not more:
                raise _broken(path, offset + start, "cut short, or not a list")
            text, offset, position = text[position:] + more, offset + position, 0


def _to_its_end(file: BinaryIO, path: object, text: str, at: int) -> tuple[int, str, str]:
    """Length of the value at the beginning of ``text``; its text, cut where it is too large; and what was read after it."""
    scanner, kept, length = _ValueEnd(), list[str](), 0
    while (end := scanner.find(text)) is None:
        length += len(text)
        kept = [*kept, text] if length <= LARGEST_RECORD else ["".join(kept)[:KEPT] or text[:KEPT]]
        text = file.read(CHUNK).decode("latin-1")
        if not text:
            raise _broken(path, at, "cut short, or not a list")
    length += end
    record = "".join([*kept, text[:end]])
    return length, record if length <= LARGEST_RECORD else record[:KEPT], text[end:]


class _ValueEnd:
    """Finds where a JSON value ends, by its brackets and quotes, in text that comes in parts."""

    def __init__(self) -> None:
        self.depth, self.in_text, self.escaped = 0, False, False

    def find(self, text: str) -> int | None:
        """The position behind the value; None where it goes on after this part."""
        position = int(self.escaped)
        if not self.depth and not self.in_text and text[:1] not in ('"', "[", "{"):
            match = _SCALAR.match(text)
            assert match is not None
            return match.end() if match.end() < len(text) else None
        self.escaped = False
        while match := (_IN_TEXT if self.in_text else _STRUCTURE).search(text, position):
            position, found = match.end(), match[0]
            if found == "\\":
                self.escaped = position == len(text)
                position += 1
            elif found == '"':
                self.in_text = not self.in_text
                if not self.in_text and not self.depth:
                    return position
            elif found[0] in "[{":
                self.depth += len(found)
            elif len(found) < self.depth:
                self.depth -= len(found)
            else:
                return match.start() + self.depth
        return None


def _broken(path: object, at: int, why: str) -> DataError:
    return DataError(f"data file {path}: not JSON from byte {at} on ({why})")


def _refuse_more(path: object, at: int, rest: Iterable[bytes]) -> None:
    if any(part.strip(b" \t\r\n") for part in rest):
        raise DataError(f"data file {path}: the list ends at byte {at}, but more follows")

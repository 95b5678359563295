"""Tab-separated files, row by row: every value is the text that stands there, and pictures in it are not kept in memory.

``None``, ``N/A`` and ``nan`` are texts like others. Where a row stands in the file is told, so that it can be read again.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.files import LARGEST_FILE
from alignkd.plain_files import open_plain

LARGEST_FIELD = 256 * 2**20
"""Pictures stand in some as base64."""
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Row:
    """One row; ``start`` is the offset of its first byte in the file, ``line`` the first of its lines, from 1."""

    values: dict[str, str]
    start: int
    line: int


def read_rows(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The rows below the header; empty lines are passed over.

    Raises:
        DataError: the file cannot be read or is too large, lacks a column or has one that is neither needed nor optional, or a
            row has another number of fields.
    """
    with _open(path) as file, _wide_fields():
        lines = _Lines(path, file)
        fields = csv.reader(lines, delimiter="\t", strict=True)
        try:
            columns = next(fields, [])
            _check_columns(path, columns, needed, optional)
            start, line = lines.position, lines.count + 1
            for row in fields:
                if row:
                    if len(row) != len(columns):
                        raise DataError(f"{path}, line {line}: {len(row)} fields, expected {len(columns)}; download it again")
                    yield Row(dict(zip(columns, row, strict=True)), start, line)
                start, line = lines.position, lines.count + 1
        except csv.Error as error:
            raise DataError(f"{path}, line {lines.count}: not a tab-separated table ({error}); download it again") from error


def read_field(path: Path, start: int, column: int) -> str:
    """One value of the row that :func:`read_rows` has found at an offset.

    Raises:
        DataError: the file cannot be read, or was changed.
    """
    with _open(path) as file, _wide_fields():
        try:
            file.seek(start)
            return next(csv.reader(_Lines(path, file), delimiter="\t", strict=True))[column]
        except (StopIteration, IndexError, csv.Error) as error:
            raise DataError(f"{path} has changed since it was read ({error}); start again") from error


class _Lines:
    """The lines of a file as texts, one at a time, and how many bytes have been read."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.position, self.count = path, file, 0, 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        try:
            line = self.file.readline(2 * LARGEST_FIELD)
            self.position += len(line)
            self.count += 1
            if not line:
                raise StopIteration
            return (line.removeprefix(_BOM) if self.count == 1 else line).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}, line {self.count}: not UTF-8 ({error}); download it again") from error
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}") from error


class _wide_fields:  # noqa: N801
    """csv's limit for a field, which is one for the whole process, while a table is read."""

    def __enter__(self) -> None:
        self.before = csv.field_size_limit(LARGEST_FIELD)

    def __exit__(self, *_: object) -> None:
        csv.field_size_limit(self.before)


def _open(path: Path) -> BinaryIO:
    try:
        file = open_plain(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if (size := os.fstat(file.fileno()).st_size) > LARGEST_FILE:
        file.close()
        raise DataError(f"{path}: {size:,} bytes, more than the {LARGEST_FILE:,} allowed")
    return file


def _check_columns(path: Path, columns: Sequence[str], needed: Sequence[str], optional: Sequence[str]) -> None:
    found = f"found {', '.join(columns)[:300]}; expected {', '.join([*needed, *optional])}; download the official file again"
    if missing := [name for name in needed if name not in columns]:
        raise DataError(f"{path} lacks the columns {', '.join(missing)}; {found}")
    if unknown := [name for name in columns if name not in needed and name not in optional]:
        raise DataError(f"{path} has unknown columns, {', '.join(map(repr, unknown))[:200]}; {found}")
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} has a column twice; {found}")

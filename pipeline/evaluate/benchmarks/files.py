"""Official files, read without trust: plain files of limited size, with one message that names what is missing or wrong."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer
from alignkd.plain_files import read_plain

LARGEST_FILE = 4 * 2**30
"""The question files of the six have less than 1 GiB."""
LARGEST_FIELD = 256 * 2**20
"""Of a table: pictures stand in some as base64."""


def require_files(folder: Path, about: About, names: Sequence[str]) -> list[Path]:
    """Paths of files (or folders) that must be there.

    Raises:
        DataError: names all that are missing, where to get them and under which licence.
    """
    paths = [folder / name for name in names]
    if missing := [name for name, path in zip(names, paths, strict=True) if not path.exists()]:
        raise DataError(
            f"{folder} lacks {', '.join(missing)} of {about.title}; get the official files from {about.source} (licence:"
            f" {about.licence}) and lay them out as docs/benchmarks.md shows"
        )
    return paths


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        DataError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): download it again") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with the number of its line, from 1; empty lines are passed over.

    Raises:
        DataError: it cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: found {value!r:.80}, expected an object")
        yield number, value


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a tab-separated file, every value as the text that stands there.

    Raises:
        DataError: it cannot be read, lacks a column, or a row has another number of fields.
    """
    limit = csv.field_size_limit(LARGEST_FIELD)
    try:
        reader = csv.DictReader(io.StringIO(_text(path), newline=""), delimiter="\t", restkey="", strict=True)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise DataError(
                f"{path} lacks the columns {', '.join(missing)}; found {', '.join(map(str, reader.fieldnames or ()))[:300]}"
            )
        rows = []
        for row in reader:
            if None in row.values() or "" in row:
                raise DataError(f"{path}, line {reader.line_num}: not as many fields as columns; download it again")
            rows.append(row)
        return rows
    except csv.Error as error:
        raise DataError(f"{path} is not a tab-separated table ({error}); download it again") from error
    finally:
        csv.field_size_limit(limit)


def read_answers(path: Path) -> list[Answer]:
    """The lines of an answer file in LLaVA's format.

    Raises:
        DataError: it cannot be read, holds no line, or a line lacks a field.
    """
    answers = []
    for number, line in read_json_lines(path):
        where, given = f"{path}, line {number}", line.get("question_id")
        if not isinstance(given, str | int) or isinstance(given, bool):
            raise DataError(f"{where}: 'question_id' is {given!r:.80}, expected a text or a whole number")
        for name in ("text", "prompt"):
            if not isinstance(line.get(name, "" if name == "prompt" else None), str):
                raise DataError(f"{where}: {name!r} is {line.get(name)!r:.80}, expected a text")
        answers.append(Answer(given, line.get("prompt", ""), line["text"], number))
    if not answers:
        raise DataError(f"{path} holds no answers; expected LLaVA's answer format, one JSON object a line")
    return answers


def _text(path: Path) -> str:
    try:
        return read_plain(path, LARGEST_FILE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); download it again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error

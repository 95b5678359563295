"""Official files, read without trust: plain files of limited size, with one message that names what is missing or wrong."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer
from alignkd.plain_files import read_plain

LARGEST_FILE = 4 * 2**30
"""The question files of the six have less than 1 GiB."""


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
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}): download it again") from error


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file of JSON lines, each with the number of its line, from 1; empty lines are passed over.

    Raises:
        DataError: it cannot be read, or a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({error}); expected one object a line") from error
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number}: found {value!r:.80}, expected an object")
        yield number, value


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


def read_text(path: Path, limit: int = LARGEST_FILE) -> str:
    """The text of a plain file of at most ``limit`` bytes.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return read_plain(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); download it again") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error

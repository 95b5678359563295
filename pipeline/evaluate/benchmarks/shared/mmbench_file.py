"""MMBench's official table: questions with their passes, and where in the file each picture stands."""

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About
from alignkd.pipeline.evaluate.benchmarks.pictures import LARGEST_PICTURE
from alignkd.pipeline.evaluate.benchmarks.shared.table import Row, read_field, read_rows

FILES = ("mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv")
"""MobileVLM's, LLaVA-1.5's and VLMEvalKit's; the first that is there is read."""
A_PASS = 1_000_000
"""Later passes of question i have the indices i + A_PASS, i + 2 A_PASS, ..."""

_OPTIONS = "ABCD"
_NEEDED = ("index", "question", "hint", *_OPTIONS, "answer", "category", "image", "l2-category")
_OPTIONAL = ("source", "comment", "split")
_LONGEST_INDEX = 64
"""A longer ``image`` is the picture itself."""


@dataclass(frozen=True)
class Task:
    """One row: one pass of a question. ``options``: by their letters, those that are not empty. ``area``: the coarser skill.

    ``picture``: the index of the row that holds it.
    """

    index: int
    question: str
    hint: str
    options: Mapping[str, str]
    answer: str
    category: str
    area: str
    picture: str


@dataclass(frozen=True)
class Table:
    """All rows by index, in the order of the file, and where pictures stand in it; they are read when asked for."""

    path: Path
    tasks: Mapping[int, Task]
    pictures: Mapping[str, int]
    column: int

    def picture(self, index: str) -> bytes:
        """The picture of the row with this index, decoded from base64.

        Raises:
            DataError: no row holds it, it is too large, or it is no base64.
        """
        if index not in self.pictures:
            raise DataError(f"{self.path}: no row with index {index!r:.80} holds a picture; download it again")
        text = read_field(self.path, self.pictures[index], self.column)
        if len(text) > LARGEST_PICTURE * 4 // 3:
            raise DataError(f"{self.path}: the picture of row {index} has more than {LARGEST_PICTURE:,} bytes")
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{self.path}: the picture of row {index} is not base64 ({error}); download it again") from error


def read_table(folder: Path, about: About) -> Table:
    """The official file of a folder. Equal pictures have one place.

    Raises:
        DataError: it is missing or of another split, lacks a column or has others, or a row cannot be scored.
    """
    path = _official_file(folder, about)
    rows: dict[int, Row] = {}
    pictures, named, seen = dict[str, int](), dict[int, str](), dict[bytes, str]()
    for row in read_rows(path, _NEEDED, _OPTIONAL):
        index, image = _index(path, row), row.values["image"]
        if index in rows:
            raise DataError(f"{path}, line {row.line}: the index {index} stands twice; download it again")
        named[index] = image.strip()
        if len(image) > _LONGEST_INDEX:
            named[index] = seen.setdefault(hashlib.blake2b(image.encode()).digest(), str(index))
            pictures.setdefault(named[index], row.start)
        rows[index] = Row({**row.values, "image": ""}, row.start, row.line)
    _require_passes(path, rows)
    # A row may name the row that holds its picture, and that one another with the same picture.
    by_name = {str(index): name for index, name in named.items()}
    tasks = {index: _task(path, row, by_name.get(named[index], named[index])) for index, row in rows.items()}
    return Table(path, tasks, pictures, list(next(iter(rows.values())).values).index("image"))


def _official_file(folder: Path, about: About) -> Path:
    for name in FILES:
        if (folder / name).exists():
            return folder / name
    try:
        tables = sorted(name for name in os.listdir(folder) if name.lower().startswith("mmbench") and name.endswith(".tsv"))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}") from error
    found = ""
    if tables:
        found = (
            f"; found {', '.join(tables)[:200]}: _V11 and other languages are other data sets, and test files hold no answers:"
            " none of them gives the figure that papers print"
        )
    raise DataError(
        f"{folder} lacks {FILES[0]} (or {FILES[1]}, {FILES[2]}) of {about.title}{found}; get the official file from"
        f" {about.source} (licence: {about.licence}) and lay it out as docs/benchmarks.md shows"
    )


def _index(path: Path, row: Row) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", row.values["index"]):
        raise DataError(f"{path}, line {row.line}: 'index' is {row.values['index']!r:.80}, expected a whole number")
    return int(row.values["index"])


def _require_passes(path: Path, rows: Mapping[int, Row]) -> None:
    if not rows:
        raise DataError(f"{path} holds no questions; download it again")
    for index, row in rows.items():
        if index >= A_PASS and index - A_PASS not in rows:
            raise DataError(
                f"{path}, line {row.line}: index {index} is a later pass of question {index % A_PASS}, and the pass before it"
                " is missing; download it again"
            )


def _task(path: Path, row: Row, picture: str) -> Task:
    values, where = row.values, f"{path}, line {row.line} (index {row.values['index']})"
    if (split := values.get("split", "dev")) != "dev":
        raise DataError(f"{where}: 'split' is {split!r:.80}, expected dev; other splits give another figure: get the dev file")
    options = {letter: values[letter] for letter in _OPTIONS if values[letter]}
    if values["answer"] not in options:
        raise DataError(
            f"{where}: 'answer' is {values['answer']!r:.80}, expected one of {', '.join(options) or 'its options'}; test files"
            " hold no answers: get the dev file"
        )
    return Task(
        _index(path, row),
        values["question"],
        values["hint"],
        options,
        values["answer"],
        values["category"],
        values["l2-category"],
        picture,
    )

"""Which reader reads what: by the name of the data, then by its first bytes."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from alignkd.pipeline.data.contract import Reader, Source

_PACKAGE = "alignkd.pipeline.data.readers"


@dataclass(frozen=True)
class ReaderRecord:
    """A reader by its module; ``suffixes`` and ``magic`` (bytes at an offset) say what it reads; ``folder``: a folder, too."""

    module: str
    suffixes: tuple[str, ...] = ()
    magic: bytes = b""
    magic_at: int = 0
    folder: bool = False


JSON = ReaderRecord("json_file", (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"))
READERS: tuple[ReaderRecord, ...] = (JSON,)
_HEAD = 512


def reader_of(source: Source) -> Reader:
    """The reader of some data; that of JSON, which says what it found, where no other knows it."""
    record = _by_name(source.data) or _by_content(source.data) or JSON
    return cast(Reader, importlib.import_module(f"{_PACKAGE}.{record.module}"))


def _by_name(data: str) -> ReaderRecord | None:
    name = data.rstrip("/").lower()
    return next((record for record in READERS if name.endswith(record.suffixes)), None)


def _by_content(data: str) -> ReaderRecord | None:
    path = Path(data)
    if path.is_dir():
        return next((record for record in READERS if record.folder), None)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return None  # what is wrong is said when it is opened
    return next((record for record in READERS if record.magic and head[record.magic_at :].startswith(record.magic)), None)

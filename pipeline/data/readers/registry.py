"""Which reader reads what: by the name of the data, by what lies in a folder, then by its first bytes."""

import importlib
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import cast

from alignkd.pipeline.data.contract import Reader, Source
from alignkd.pipeline.data.readers.files.shard_names import is_pattern, names_in

_PACKAGE = "alignkd.pipeline.data.readers"


@dataclass(frozen=True)
class ReaderRecord:
    """A reader by its module; ``suffixes`` and ``magic`` (bytes at an offset) say which files it reads, ``folder`` which names
    a folder of its own holds."""

    module: str
    suffixes: tuple[str, ...] = ()
    magic: bytes = b""
    magic_at: int = 0
    folder: tuple[str, ...] = ()


JSON = ReaderRecord("json_file", (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz"))
READERS: tuple[ReaderRecord, ...] = (
    JSON,
    ReaderRecord("saved_dataset", folder=("dataset_dict.json", "dataset_info.json", "state.json")),
    ReaderRecord("parquet", (".parquet",), magic=b"PAR1", folder=("*.parquet", "data/*.parquet")),
    ReaderRecord("webdataset", (".tar",), magic=b"ustar", magic_at=257, folder=("*.tar", "data/*.tar")),
)
_HEAD = 512


def reader_of(source: Source) -> Reader:
    """The reader of some data; that of JSON, which says what it found, where no other knows it."""
    record = _by_name(source.data) or _by_content(source.data) or JSON
    return cast(Reader, importlib.import_module(f"{_PACKAGE}.{record.module}"))


def _by_name(data: str) -> ReaderRecord | None:
    if "://" not in data and Path(data).is_dir():
        return None
    name = data.rstrip("/").lower()
    return next((record for record in READERS if name.endswith(record.suffixes)), None)


def _by_content(data: str) -> ReaderRecord | None:
    if "://" in data or Path(data).is_dir():
        if is_pattern(data):
            return None
        names = [name.rpartition("/")[2] for name in names_in(data)]
        names += [f"data/{name.rpartition('/')[2]}" for name in names_in(f"{data.rstrip('/')}/data")] if "data" in names else []
        return next((r for r in READERS if any(fnmatch(name, mark) for mark in r.folder for name in names)), None)
    try:
        with Path(data).open("rb") as file:
            head = file.read(_HEAD)
    except (OSError, ValueError):
        return None  # what is wrong is said when it is opened
    return next((record for record in READERS if record.magic and head[record.magic_at :].startswith(record.magic)), None)

"""Folders of ``Dataset.save_to_disk`` and ``DatasetDict.save_to_disk`` of the library ``datasets``.

Their Arrow files are mapped into memory, in the order of ``state.json``. No code of the folder is run, nothing is unpickled.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.errors import ConfigError, DataError, wrap_errors
from alignkd.pipeline.data.contract import Samples, Source
from alignkd.pipeline.data.readers.files.shard_file import ShardFile
from alignkd.pipeline.data.readers.files.shard_names import names_in
from alignkd.pipeline.data.readers.tables import LOCATORS, TableSamples, require_pyarrow

_STATE, _SPLITS = "state.json", "dataset_dict.json"
_MAX_BYTES = 64 << 20


def open_source(source: Source) -> Samples:
    """As :meth:`alignkd.pipeline.data.contract.Reader.open_source`."""
    return TableSamples(source, _files(source))


def known_source(source: Source, keys: np.ndarray, locators: Mapping[str, np.ndarray]) -> Samples | None:
    """As :meth:`alignkd.pipeline.data.contract.Reader.known_source`."""
    return TableSamples(source, _files(source), keys, locators) if set(LOCATORS) <= locators.keys() else None


def size(source: Source) -> int:
    """As :meth:`alignkd.pipeline.data.contract.Reader.size`."""
    return sum(ShardFile(name).size() for name in _names(source.data))


def _files(source: Source) -> list[Any]:
    require_pyarrow(source.data)
    from alignkd.pipeline.data.readers.columnar.table_files import ArrowFile

    return [ArrowFile(name) for name in _names(source.data)]


def _names(data: str) -> list[str]:
    """The Arrow files of a folder.

    Raises:
        ConfigError: it holds several splits.
        DataError: it is not whole.
    """
    folder = data.rstrip("/")
    inside = {name.rpartition("/")[2] for name in names_in(folder)}
    if _SPLITS in inside:
        splits = _read(folder, _SPLITS).get("splits")
        if not isinstance(splits, list) or not splits or not all(_is_name(split) for split in splits):
            raise DataError(f"{folder}/{_SPLITS} names no splits: the folder is damaged; save the dataset again")
        if len(splits) > 1:
            raise ConfigError(
                f"--data {data} holds the splits {', '.join(splits)}; give one of them: --data {folder}/{splits[0]}"
            )
        return _names(f"{folder}/{splits[0]}")
    if _STATE not in inside:
        raise DataError(f"{folder} has no {_STATE}, which save_to_disk writes last: save the dataset again")
    entries = _read(folder, _STATE).get("_data_files")
    names = (
        [entry.get("filename") if isinstance(entry, dict) else None for entry in entries] if isinstance(entries, list) else []
    )
    if not names or not all(_is_name(name) for name in names):
        raise DataError(f"{folder}/{_STATE} names no files of its own folder: it is damaged; save the dataset again")
    return [f"{folder}/{name}" for name in names]


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and not set(name) & set("/\\\0") and not name.startswith(".")


def _read(folder: str, name: str) -> dict[str, Any]:
    file = ShardFile(f"{folder}/{name}")
    if (length := file.size()) > _MAX_BYTES:
        raise DataError(f"{folder}/{name} has {length:,} bytes, at most {_MAX_BYTES:,} are read")
    with wrap_errors(DataError, f"{folder}/{name} is not JSON", ValueError, RecursionError):
        found = json.loads(file.read(0, length))
    if not isinstance(found, dict):
        raise DataError(f"{folder}/{name} holds no object: the folder is damaged; save the dataset again")
    return found

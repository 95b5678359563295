"""Parquet: one file, a folder of them, or a pattern; images inside as structures of bytes and path, or beside them."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.errors import ConfigError
from alignkd.pipeline.data.contract import Samples, Source
from alignkd.pipeline.data.readers.files.shard_file import ShardFile
from alignkd.pipeline.data.readers.files.shard_names import is_pattern, shard_names
from alignkd.pipeline.data.readers.tables import LOCATORS, TableSamples, require_pyarrow

_SPLIT = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?\.parquet")


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
    from alignkd.pipeline.data.readers.columnar.table_files import ParquetFile

    return [ParquetFile(name) for name in _names(source.data)]


def _names(data: str) -> list[str]:
    """The files; those of one split, where a folder has several.

    Raises:
        ConfigError: it has several splits, and nothing says which.
    """
    names = shard_names(data, (".parquet",))
    matches = [_SPLIT.fullmatch(name.rpartition("/")[2]) for name in names]
    splits = sorted({match["split"] for match in matches if match})
    if len(splits) > 1 and not is_pattern(data):
        first = names[0].rpartition("/")[0]
        raise ConfigError(
            f"--data {data} holds the splits {', '.join(splits)}; give one of them: --data '{first}/{splits[-1]}-*.parquet'"
        )
    return names

"""The files that a ``--data`` of several files names: braces, wildcards, or a folder; on this machine or at a URL."""

import glob
import os
from typing import Any

from alignkd.errors import ConfigError, DataError, wrap_errors

_WILDCARDS = "*?["


def shard_names(data: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files, sorted by name where the order is not said: paths or URLs.

    Braces (``{000..123}.tar``) are those of ``webdataset``; a folder stands for its files of these suffixes, and for those of
    its folder ``data``, where the Hugging Face hub has them.

    Raises:
        DataError: there are none.
        ConfigError: a URL that cannot be opened.
    """
    if "://" not in data and os.path.isfile(data):
        return [data]
    if "{" in data:
        from webdataset.shardlists import expand_urls  # loads torch

        return [name for pattern in expand_urls(data) for name in (_matching(pattern) if is_pattern(pattern) else [pattern])]
    if is_pattern(data):
        return _matching(data)
    if not data.endswith(suffixes) or os.path.isdir(data):
        folder = data.rstrip("/")
        for place in (folder, f"{folder}/data"):
            if found := [name for name in names_in(place) if name.endswith(suffixes)]:
                return found
        raise DataError(f"{data} holds no {' or '.join(suffixes)} files")
    return [data]


def is_pattern(data: str) -> bool:
    """Whether it has braces or wildcards."""
    return any(sign in data for sign in _WILDCARDS + "{")


def _matching(pattern: str) -> list[str]:
    found = sorted(_file_system(pattern)[0].glob(pattern)) if "://" in pattern else sorted(glob.glob(pattern))
    if not found:
        raise DataError(f"{pattern}: no file has such a name")
    return [_with_scheme(name, pattern) for name in found]


def names_in(folder: str) -> list[str]:
    """The paths or URLs of what lies in a folder, sorted; none where there is no such folder."""
    if "://" not in folder:
        return sorted(entry.path for entry in os.scandir(folder)) if os.path.isdir(folder) else []
    files, path = _file_system(folder)
    try:
        entries = files.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [_with_scheme(name, folder) for name in sorted(entries)]


def _with_scheme(name: str, like: str) -> str:
    scheme, mark, _ = like.partition("://")
    return name if not mark or "://" in name else f"{scheme}://{name.lstrip('/')}"


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    with wrap_errors(ConfigError, f"cannot open --data {url}"):
        files, path = fsspec.core.url_to_fs(url)
    return files, path

"""Merge caches and take parts of them, with progress, where there is room."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from alignkd.cache_store.protocol import manifest
from alignkd.cache_store.protocol.maintenance.merge import check_shared, merge, plan_merge
from alignkd.cache_store.protocol.maintenance.subset import find_keys, select, subset
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.row import is_key
from alignkd.cache_store.storage import open_storage
from alignkd.errors import DataError
from alignkd.pipeline.cache_admin.room import check_room
from alignkd.pipeline.cache_admin.without_targets import without_targets
from alignkd.pipeline.runtime.progress import progress_bar
from alignkd.plain_files import read_plain

_ADVICE = "write to another place"
_LARGEST = 1 << 30
"""Bytes of a list of ids or keys."""


def merge_with_progress(
    urls: Sequence[str], target: str, shard_format: str | None, shard_samples: int | None, *, prefer_first: bool
) -> CacheStore:
    """Merge the caches at ``urls`` into one at ``target``. Raises as the functions of ``cache_store`` that it calls."""
    merging = plan_merge(urls)
    samples = np.bincount(merging.selection.sources, minlength=len(urls)).tolist()
    needed = sum(map(_bytes_of, merging.readers, samples))
    _check_room(target, needed)
    with progress_bar("compare", len(merging.shared), "shared samples", show=bool(merging.shared)) as progress:
        check_shared(merging, prefer_first=prefer_first, on_row=progress.advance)
    size = shard_samples or merging.readers[0].plan.shard_samples
    shards = -(-len(merging.selection.keys) // size)
    with progress_bar("merge", shards, "shards", done=_done(target)) as progress:
        return merge(merging, target, shard_format=shard_format, shard_samples=shard_samples, on_shard=progress.advance)


def subset_with_progress(
    url: str,
    target: str,
    shard_format: str | None,
    shard_samples: int | None,
    *,
    keys: np.ndarray | None = None,
    ids: Sequence[str] = (),
    without: Sequence[str] = (),
) -> CacheStore:
    """Write a part of the cache at ``url`` to ``target``: samples of these keys ``[N, 16]`` or ids, or all, without targets.

    Raises as the functions of ``cache_store`` that it calls.
    """
    reader = CacheReader(url, max_shards=4)
    spec, tensors = without_targets(reader.spec, reader.tensors, without) if without else (reader.spec, list(reader.tensors))
    selection = select(reader, find_keys(reader, ids) if ids else keys)
    kept = {field.name for field in spec.fields}
    _check_room(target, _bytes_of(reader, len(selection.keys), kept))
    shards = -(-len(selection.keys) // (shard_samples or reader.plan.shard_samples))
    with progress_bar("subset", shards, "shards", done=_done(target)) as progress:
        return subset(
            reader,
            selection,
            target,
            spec,
            tensors=tensors,
            shard_format=shard_format,
            shard_samples=shard_samples,
            on_shard=progress.advance,
        )


def read_keys(path: str | Path) -> np.ndarray:
    """The keys ``[N, 16]`` in a file that has one of 32 hexadecimal characters a line.

    Raises:
        DataError: it cannot be read, or has another line.
    """
    lines = read_lines(path)
    for line in lines:
        if not is_key(line):
            raise DataError(f"{path}: found {line[:80]!r}, expected a key of 32 characters 0-9 and a-f a line")
    return np.frombuffer(bytes.fromhex("".join(lines)), np.uint8).reshape(-1, 16)


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty.

    Raises:
        DataError: it cannot be read, is no UTF-8, or holds none.
    """
    try:
        lines = [line.strip() for line in read_plain(Path(path), _LARGEST).decode().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not (found := [line for line in lines if line]):
        raise DataError(f"{path}: found no line with text, expected one a sample")
    return found


def _bytes_of(reader: CacheReader, samples: int, fields: set[str] | None = None) -> int:
    """Bytes that so many samples of a cache take, with these fields or all."""
    records = reader.records.values()
    dropped = sum(size for r in records for name, size in r.bytes_by_field.items() if fields and name not in fields)
    return (sum(record.bytes for record in records) - dropped) * samples // max(reader.plan.samples, 1)


def _check_room(target: str, needed: int) -> None:
    there = 0
    if open_storage(target).size(manifest.NAME) is not None:
        there = sum(record.bytes for record in open_store(target).status().records.values())
    check_room(open_storage(target), max(needed - there, 0), _ADVICE)


def _done(target: str) -> int:
    return open_store(target).status().shards_done if open_storage(target).size(manifest.NAME) is not None else 0

"""Rows of caches packed into the shards of another one: their stored parts are copied, not decoded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.errors import MissingRowError
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.protocol.tensors import TensorEntry
from alignkd.cache_store.rows.encode import EncodedRow
from alignkd.cache_store.rows.row import Rejected
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.errors import CacheError

_NOTES = ("answers", "weights")
_AHEAD = 3
"""Shards of a source that are fetched ahead."""


@dataclass(frozen=True)
class Selection:
    """The samples of a cache to be: ``keys`` uint8 [N, 16] in order, and which of the sources each is taken from, int [N]."""

    keys: NDArray[np.uint8]
    sources: NDArray[np.int64]


def repack(
    readers: Sequence[CacheReader],
    selection: Selection,
    target: str | Path,
    spec: CacheSpec,
    *,
    shard_format: str,
    shard_samples: int,
    tensors: Collection[str],
    made_by: str,
    on_shard: Callable[[], None] | None = None,
) -> CacheStore:
    """Write the selected rows and rejections to ``target``; another run with the same sources continues where this one stopped.

    ``spec``: its fields are all those of the sources, or some of them. ``tensors``: the names of those that are kept.

    Raises:
        FingerprintMismatchError: another cache at ``target``.
        CacheError: a damaged shard or tensor, or other tensors at ``target``.
        ConfigError: an unknown format, or a URL that cannot be opened.
    """
    plan = Plan(selection.keys, shard_samples, {**_shared_notes(readers), "made_by": made_by})
    source = readers[0].tensors
    entries: dict[str, TensorEntry] = {name: entry for name, entry in source.entries.items() if name in tensors}
    store = CacheStore.create_or_open(
        target, spec, plan, shard_format=shard_format, tensors=lambda: {name: source[name] for name in entries}
    )
    if store.manifest.tensors != entries:
        raise CacheError(
            f"the cache at {target} has other tensors than those of the rows that would be written to it, and rows match only"
            " the tensors of their own cache. Write to another folder or URL"
        )
    for number in store.pending():
        rows, rejected = _of_shard(readers, selection, plan.positions_of(number), spec)
        store.commit_shard(number, rows, rejected, worker=made_by.split()[-1])
        if on_shard is not None:
            on_shard()
    return store


def _shared_notes(readers: Sequence[CacheReader]) -> dict[str, Any]:
    """Of what planners noted, what holds for every sample: whose answers were planned."""
    first, *others = [part.meta for reader in readers for part in reader.plan.parts]
    return {name: first[name] for name in _NOTES if name in first and all(first[name] == meta.get(name) for meta in others)}


def rejected_of(reader: CacheReader, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which of some keys ``[N, 16]`` a cache rejected."""
    known = np.frombuffer(bytes.fromhex("".join(reader.rejected)), np.uint8).reshape(-1, 16)
    if not len(known):
        return np.zeros(len(keys), dtype=bool)
    found: NDArray[np.bool_] = Plan(known, len(known), {}).locate(keys) >= 0
    return found


def _of_shard(
    readers: Sequence[CacheReader], selection: Selection, positions: range, spec: CacheSpec
) -> tuple[list[EncodedRow], list[Rejected]]:
    rows, rejected, names = [], [], [field.name for field in spec.fields]
    part = slice(positions.start, positions.stop)
    keys, sources = selection.keys[part], selection.sources[part]
    for source, reader in enumerate(readers):
        mine = keys[sources == source]
        coming = list(dict.fromkeys(reader.shards_of(mine).tolist()))
        place = {number: i for i, number in enumerate(coming)}
        for key in (key.tobytes().hex() for key in mine):
            if key in reader.rejected:
                rejected.append(reader.rejected[key])
                continue
            number = reader.shard_of(key)
            reader.prefetch(coming[place[number] : place[number] + _AHEAD])
            rows.append(_copied(reader.encoded_row(key, names)))
    return rows, rejected


def _copied(row: EncodedRow) -> EncodedRow:
    """The row with arrays of its own: a few rows of each of many shards must not keep all of those in memory."""
    return row._replace(parts={field: {p: np.array(a) for p, a in parts.items()} for field, parts in row.parts.items()})


def require_whole(reader: CacheReader, keys: NDArray[np.uint8]) -> None:
    """Refuse a source that holds neither row nor rejection of some of its samples ``[N, 16]``.

    Raises:
        MissingRowError: names the first of them, and what to do.
    """
    lacking = np.flatnonzero(reader.shards_of(keys) < 0)
    if not len(lacking):
        return
    first = keys[lacking[0]].tobytes().hex()
    if (reader.plan.locate(keys[lacking]) < 0).any():
        first = next(key for key in (keys[i].tobytes().hex() for i in lacking) if reader.plan.shard_of(key) is None)
        raise MissingRowError(
            f"the cache at {reader.url} was never planned to hold {len(lacking):,} of the {len(keys):,} samples asked for, the"
            f" first of them of key {first}: add them to it with alignkd cache append, or leave them out"
        )
    raise MissingRowError(
        f"the cache at {reader.url} is not complete: {len(lacking):,} of the {len(keys):,} samples asked for are not committed"
        " yet. Run alignkd cache-teacher on it again (alignkd cache append for samples that were appended)"
    )

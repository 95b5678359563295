"""Merge caches of one fingerprint, but for their data, into another one: each sample once."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.protocol.maintenance.repack import Selection, rejected_of, repack, require_whole
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.encode import EncodedRow
from alignkd.cache_store.rows.spec import CacheSpec, check_spec, without_data
from alignkd.errors import CacheError, ConfigError

_SHOWN = 3
_SAMPLE_FIELDS = ("input_ids", "labels", "spans")
"""What follows from a sample alone: where it differs, the sample or how it was prepared did, and no choice is right."""


@dataclass(frozen=True)
class Merging:
    """Caches that fit together, and which of them each sample comes from.

    ``shared``: samples of which two caches have a row, as (source that is taken, other source, key).
    """

    readers: list[CacheReader]
    selection: Selection
    shared: list[tuple[int, int, str]]


def plan_merge(urls: Sequence[str | Path]) -> Merging:
    """Open the caches and decide where each sample comes from: the first cache that has a row of it. No shard is read.

    Raises:
        ConfigError: fewer than two caches, or one twice.
        FingerprintMismatchError: they differ in more than their data; names each difference with both values.
        CacheError: they have other tensors, or one of them is damaged or not complete.
    """
    if len(urls) < 2 or len({str(url) for url in urls}) < len(urls):
        raise ConfigError(f"merge: found {', '.join(map(str, urls)) or 'no cache'}, expected two caches or more, each once")
    readers = [CacheReader(url, max_shards=4) for url in urls]
    for reader in readers[1:]:
        _require_alike(readers[0], reader)
    for reader in readers:
        require_whole(reader, reader.plan.keys)
    selection, shared = _select(readers)
    return Merging(readers, selection, shared)


def check_shared(merging: Merging, *, prefer_first: bool, on_row: Callable[[], None] | None = None) -> None:
    """Compare the rows of samples that several caches have; ``prefer_first``: their targets may differ.

    Raises:
        CacheError: rows differ; names the samples, the fields and what to do.
    """
    different = []
    for chosen, other, key in merging.shared:
        names = [field.name for field in merging.readers[0].spec.fields]
        pair = [merging.readers[source].encoded_row(key, names) for source in (chosen, other)]
        fields = [name for name in names if not _same(pair[0], pair[1], name)]
        own = [name for name in fields if name in _SAMPLE_FIELDS]
        if pair[0].id.image_sha256 != pair[1].id.image_sha256:
            own.append("image_sha256")
        if own or (fields and not prefer_first):
            different.append((pair[0].id.sample_id or key, own or fields, bool(own), chosen, other))
        if on_row is not None:
            on_row()
    if not different:
        return
    sample_id, fields, of_sample, chosen, other = next((one for one in different if one[2]), different[0])
    where = f"{merging.readers[chosen].url} and {merging.readers[other].url}"
    named = ", ".join(repr(one[0]) for one in different[:_SHOWN]) + (", ..." if len(different) > _SHOWN else "")
    if of_sample:
        todo = "its text, images or preparation changed in between, so these caches do not belong together"
    else:
        todo = (
            "another batch, device or release gives other last bits: give --prefer-first to take the rows of the cache that is"
            " named first"
        )
    raise CacheError(
        f"{len(different):,} samples have other rows in one cache than in another: {named}. Sample {sample_id!r} differs in"
        f" {', '.join(fields)} between {where}: {todo}"
    )


def merge(
    merging: Merging,
    target: str | Path,
    *,
    shard_format: str | None = None,
    shard_samples: int | None = None,
    on_shard: Callable[[], None] | None = None,
) -> CacheStore:
    """Write the merged cache; another run continues where this one stopped. Format and samples per shard: the first cache's.

    Raises:
        As :func:`repack`; ConfigError where ``target`` is one of the caches.
    """
    first = merging.readers[0]
    if str(target) in [reader.url for reader in merging.readers]:
        raise ConfigError(f"merge: {target} is one of the caches that would be merged into it: name a place of its own")
    return repack(
        merging.readers,
        merging.selection,
        target,
        with_data(first.spec, merging.selection.keys),
        shard_format=shard_format or first.shard_format,
        shard_samples=shard_samples or first.plan.shard_samples,
        tensors=first.tensors.entries,
        made_by="alignkd cache merge",
        on_shard=on_shard,
    )


def with_data(spec: CacheSpec, keys: NDArray[np.uint8]) -> CacheSpec:
    """The specification of a cache of these samples ``[N, 16]``, where its fingerprint has a digest of them."""
    if "data" not in spec.fingerprint:
        return spec
    return CacheSpec(spec.fields, {**spec.fingerprint, "data": hashlib.sha256(keys.tobytes()).hexdigest()})


def _require_alike(first: CacheReader, other: CacheReader) -> None:
    check_spec(without_data(first.spec), without_data(other.spec), cache=f"{first.url} and the one at {other.url}")
    ours, theirs = first.tensors.entries, other.tensors.entries
    if ours != theirs:
        names = sorted(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
        raise CacheError(
            f"the caches at {first.url} and {other.url} have other tensors ({', '.join(names)}): each was calibrated on its own"
            " samples, and rows match only the tensors of their own cache. Write one of them again with alignkd cache-teacher"
            f" --calibration-from {shlex.quote(first.url)}, or add its data with alignkd cache append --cache"
            f" {shlex.quote(first.url)}"
        )


def _select(readers: Sequence[CacheReader]) -> tuple[Selection, list[tuple[int, int, str]]]:
    keys = readers[0].plan.keys
    sources = np.zeros(len(keys), np.int64)
    without_row = rejected_of(readers[0], keys)
    shared: list[tuple[int, int, str]] = []
    for number, reader in enumerate(readers[1:], 1):
        mine, rejected = reader.plan.keys, rejected_of(reader, reader.plan.keys)
        at = Plan(keys, len(keys), {}).locate(mine)
        known = at >= 0
        # A row is better than a rejection: what one run could not read, another could.
        better = at[known & ~rejected][without_row[at[known & ~rejected]]]
        both = np.flatnonzero(known & ~rejected)
        both = both[~without_row[at[both]]]
        shared += [(int(sources[at[i]]), number, mine[i].tobytes().hex()) for i in both]
        sources[better], without_row[better] = number, False
        keys = np.concatenate([keys, mine[~known]])
        sources = np.concatenate([sources, np.full((~known).sum(), number)])
        without_row = np.concatenate([without_row, rejected[~known]])
    return Selection(keys, sources), shared


def _same(a: EncodedRow, b: EncodedRow, field: str) -> bool:
    ours, theirs = a.parts[field], b.parts[field]
    return a.shapes[field] == b.shapes[field] and all(np.array_equal(ours[part], theirs[part]) for part in ours)

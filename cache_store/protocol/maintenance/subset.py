"""A part of a cache as a cache of its own: some of its samples, or some of its fields."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.protocol.maintenance.merge import with_data
from alignkd.cache_store.protocol.maintenance.repack import Selection, repack, require_whole
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.errors import ConfigError, DataError


def select(reader: CacheReader, keys: NDArray[np.uint8] | None) -> Selection:
    """The samples of these keys ``[N, 16]``, or all, in the order of the cache's plan.

    Raises:
        DataError: no keys.
        MissingRowError: the cache lacks some of them.
    """
    wanted = reader.plan.keys if keys is None else keys
    if not len(wanted):
        raise DataError("a subset without samples: expected one at least")
    require_whole(reader, wanted)
    kept = reader.plan.keys[np.unique(reader.plan.locate(wanted))]
    return Selection(kept, np.zeros(len(kept), np.int64))


def find_keys(reader: CacheReader, sample_ids: Collection[str]) -> NDArray[np.uint8]:
    """Keys ``[N, 16]`` of all samples with one of these ids, rejected ones too. Reads every shard.

    Raises:
        DataError: an id that no sample has; names the first.
    """
    wanted, found, seen = set(sample_ids), [], set[str]()
    for number in reader.records:
        reader.prefetch([number, number + 1] if number + 1 in reader.records else [number])
        rows = [(row.sample_id, row.key) for row in reader.shard(number).ids]
        rows += [(sample.sample_id, sample.key) for sample in reader.records[number].rejected]
        found += [key for sample_id, key in rows if sample_id in wanted]
        seen.update(sample_id for sample_id, _ in rows)
    if lacking := sorted(wanted - seen):
        raise DataError(
            f"the cache at {reader.url} has no sample of {len(lacking):,} of the {len(wanted):,} ids asked for, the first of"
            f" them {lacking[0]!r}: take them out, or add their samples with alignkd cache append"
        )
    return np.frombuffer(bytes.fromhex("".join(found)), np.uint8).reshape(-1, 16)


def subset(
    reader: CacheReader,
    selection: Selection,
    target: str | Path,
    spec: CacheSpec,
    *,
    tensors: Collection[str],
    shard_format: str | None = None,
    shard_samples: int | None = None,
    on_shard: Callable[[], None] | None = None,
) -> CacheStore:
    """Write the selected samples; another run continues where this one stopped. Format and samples per shard: the source's.

    ``spec``: the fields that are kept, and the fingerprint of a cache with these alone, whose data are set here.

    Raises:
        As :func:`repack`; ConfigError where ``target`` is the cache itself.
    """
    if str(target) == reader.url:
        raise ConfigError(f"subset: {target} is the cache itself: name another place")
    return repack(
        [reader],
        selection,
        target,
        with_data(spec, selection.keys),
        shard_format=shard_format or reader.shard_format,
        shard_samples=shard_samples or reader.plan.shard_samples,
        tensors=tensors,
        made_by="alignkd cache subset",
        on_shard=on_shard,
    )

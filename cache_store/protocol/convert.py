"""A cache in another shard format: the same rows to the last bit, so the same content sha256."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignkd.cache_store.formats.registry import FORMATS
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore


def other_format(name: str) -> str:
    """The format that a cache is converted to when none is named."""
    return next(known for known in FORMATS if known != name)


def convert(
    source: str | Path, target: str | Path, shard_format: str | None = None, *, on_shard: Callable[[], None] | None = None
) -> CacheStore:
    """Copy what is committed at ``source`` to ``target``; running it again goes on where it stopped.

    Rows are not decoded: their stored parts go from one format into the other. ``on_shard`` is called after each shard.
    ValueError where there is no cache at ``source``, or another one at ``target``; CorruptShardError for a damaged shard,
    DamagedTensorError for a damaged tensor.
    """
    reader = CacheReader(source, max_shards=2)
    wanted = shard_format or other_format(reader.shard_format)
    store = CacheStore.create_or_open(target, reader.spec, reader.plan, shard_format=wanted, tensors=reader.tensors)
    if store.manifest.tensors != reader.tensors.entries:
        raise ValueError(
            f"the cache at {target} keeps other tensors than the one at {source}: rows are encoded for their own cache's."
            " Convert to another place"
        )
    left = [number for number in store.pending() if number in reader.records]
    for i, number in enumerate(left):
        reader.prefetch(left[i : i + 2])
        store.commit_packed(reader.records[number], reader.shard(number))
        if on_shard is not None:
            on_shard()
    return store

"""Convert a cache to another shard format: the same rows to the last bit, so the same content sha256."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from alignkd.cache_store.formats.registry import FORMATS
from alignkd.cache_store.protocol.maintenance.append import append_plan
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.errors import CacheError


def other_format(name: str) -> str:
    """The format that a cache is converted to by default."""
    return next(known for known in FORMATS if known != name)


def convert(
    source: str | Path, target: str | Path, shard_format: str | None = None, *, on_shard: Callable[[], None] | None = None
) -> CacheStore:
    """Copy the committed shards of ``source`` to ``target``; another run continues where this one stopped.

    Rows are not decoded: their stored parts are copied from one format to the other. ``on_shard`` is called after each shard.

    Raises:
        CacheError: no cache at ``source``, another cache at ``target``, or a damaged record, shard or tensor.
        ConfigError: an unknown format, or a URL that cannot be opened.
    """
    reader = CacheReader(source, max_shards=2)
    wanted = shard_format or other_format(reader.shard_format)
    first = reader.plan.parts[0]
    store = CacheStore.create_or_open(target, reader.spec, first, shard_format=wanted, tensors=reader.tensors)
    if store.manifest.tensors != reader.tensors.entries:
        raise CacheError(
            f"the cache at {target} has other tensors than the one at {source}, and rows match only the tensors of their own"
            " cache. Convert to another folder or URL"
        )
    if len(reader.plan.parts) > 1:
        store = _with_further_plans(target, reader.plan)
    left = [number for number in store.pending() if number in reader.records]
    for i, number in enumerate(left):
        reader.prefetch(left[i : i + 2])
        store.commit_encoded(reader.records[number], reader.shard(number))
        if on_shard is not None:
            on_shard()
    return store


def _with_further_plans(target: str | Path, plan: Plan) -> CacheStore:
    """The target with each of the source's further plans that it lacks.

    Raises:
        CacheError: it has others.
    """

    def next_part(there: Plan) -> Plan | None:
        ours = [part.summary() for part in plan.parts[: len(there.parts)]]
        if ours != [part.summary() for part in there.parts]:
            raise CacheError(
                f"the cache at {target} has other appended samples than the source: convert to another folder or URL"
            )
        return plan.parts[len(there.parts)] if len(there.parts) < len(plan.parts) else None

    store = append_plan(target, next_part)
    while len(store.plan.parts) < len(plan.parts):
        store = append_plan(target, next_part)
    return store

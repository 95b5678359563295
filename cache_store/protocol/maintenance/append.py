"""Append samples to a cache: a further plan is frozen, and shards and records that exist stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from alignkd.cache_store.protocol import manifest
from alignkd.cache_store.protocol.further_plans import freeze
from alignkd.cache_store.protocol.names import require_own_folders
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.store import CacheStore, open_store


def append_plan(url: str | Path, further: Callable[[Plan], Plan | None]) -> CacheStore:
    """The cache at ``url`` with one more plan; any number of appends may run at once, and while others write shards.

    ``further`` is given the whole plan and returns the plan of the samples that it lacks, or None where it lacks none. It is
    asked again where another append was first. A kill at any point leaves the plan as it was, or the further plan as a whole.

    Raises:
        CacheError: there is no cache, it is damaged, or a sample of the further plan is planned already.
        StorageAccessError: a folder of the cache is a link to another place.
    """
    while True:
        store = open_store(url)
        require_own_folders(store.storage)
        wanted = further(store.plan)
        if wanted is None:
            return store
        if not store.manifest.grown:
            # Before the plan, so that no program that knows only the first plan takes its shards for damage. Every append
            # writes these same bytes.
            grown = replace(store.manifest, version=manifest.GROWN_VERSION)
            store.storage.replace(manifest.NAME, grown.to_json().encode())
        if freeze(store.storage, len(store.plan.parts), wanted):
            return open_store(url)

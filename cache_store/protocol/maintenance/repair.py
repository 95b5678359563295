"""Repair a damaged cache: remove what is damaged, so that the next ``cache-teacher`` rebuilds it, and sweep strays."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from alignkd.cache_store.protocol.maintenance.verify import Problem, verify
from alignkd.cache_store.protocol.names import require_own_folders
from alignkd.cache_store.protocol.retries import mark_rejected
from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.rows.reasons import count_reasons
from alignkd.cache_store.storage import open_storage
from alignkd.errors import CacheError

_log = logging.getLogger(__name__)

MIN_AGE_S = 3600.0
"""Younger strays may belong to a worker that is about to commit them."""


@dataclass(frozen=True)
class RepairReport:
    """The problems, the removed objects, the number of shards that the next ``cache-teacher`` makes, and how many rejected
    samples it tries again, by class of their reason.
    """

    problems: list[Problem]
    removed: list[str]
    shards_to_do: int
    samples_to_retry: dict[str, int]


def repair(url: str | Path, *, min_age_s: float = MIN_AGE_S, retry: Collection[str] | None = None) -> RepairReport:
    """Verify a cache, then remove every object of a problem, and strays older than ``min_age_s``.

    ``retry``: classes of reasons (:data:`alignkd.cache_store.rows.reasons.REASONS`); the shards of samples that were rejected
    for these, or for any where it is empty, are made again. None: no sample is tried again.

    Raises:
        CacheError: there is no cache; or its manifest, plan or tensors are damaged, which cannot be rebuilt from the rest.
            Then nothing is removed.
        StorageAccessError: a folder of the cache is a link to another place. Then nothing is removed either.
    """
    storage = open_storage(url)
    require_own_folders(storage)
    problems = verify(url).problems
    lost = [problem for problem in problems if problem.beyond_repair]
    if lost:
        raise CacheError("\n".join(map(str, lost)))
    removed = []
    for name in dict.fromkeys(name for problem in problems for name in problem.objects):
        storage.delete(name)
        _log.info("removed %s", name)
        removed.append(name)
    store = open_store(url)
    removed += store.sweep(min_age_s=min_age_s)
    again = [] if retry is None else mark_rejected(storage, retry)
    return RepairReport(problems, removed, len(store.pending()), count_reasons(sample.reason for sample in again))

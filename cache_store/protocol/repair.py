"""Make a damaged cache whole again: drop what is bad, so that the next ``cache-teacher`` rebuilds it; sweep strays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from alignkd.cache_store.protocol.store import open_store
from alignkd.cache_store.protocol.verify import Problem, verify
from alignkd.cache_store.storage.open_storage import open_storage

MIN_AGE_S = 3600.0
"""Strays younger than this may belong to a worker that is about to commit them."""


@dataclass(frozen=True)
class RepairReport:
    """What was wrong, which objects were removed, and how many shards are to be done (again)."""

    problems: list[Problem]
    removed: list[str]
    shards_to_do: int


def repair(url: str | Path, *, min_age_s: float = MIN_AGE_S) -> RepairReport:
    """Audit a cache and remove every object that is part of a problem, then strays older than ``min_age_s``.

    ValueError, and nothing removed, where there is no cache, or where its manifest, plan or tensors are damaged: those
    cannot be rebuilt from the rest.
    """
    storage = open_storage(url)
    problems = verify(url).problems
    lost = [problem for problem in problems if problem.beyond_repair]
    if lost:
        raise ValueError("\n".join(map(str, lost)))
    removed = []
    for name in dict.fromkeys(name for problem in problems for name in problem.objects):
        storage.delete(name)
        removed.append(name)
    store = open_store(url)
    removed += store.sweep(min_age_s=min_age_s)
    return RepairReport(problems, removed, len(store.pending()))

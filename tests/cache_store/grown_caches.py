"""Caches of numbered samples that are written in several steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from cache_samples import FASTER, SPEC, TENSORS, key_of, keys_array, make_row

from alignkd.cache_store.protocol.maintenance.append import append_plan
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.storage import open_storage

_NUMBERS = {key_of(i): i for i in range(200)}

PLACES = [
    ("local", "zarr"),
    ("local", "webdataset"),
    ("s3", "webdataset"),
    pytest.param("s3", "zarr", marks=pytest.mark.slow),
]
"""Where a cache lies, and in which format."""

RowSource = Callable[[int], Row]


def place(request: pytest.FixtureRequest, folder: Path, where: str) -> str:
    """The URL of a cache to be."""
    return str(folder / "cache") if where == "local" else request.getfixturevalue(f"{where}_url")


def content(url: str | Path) -> str:
    """The content sha256 of a whole cache without a problem."""
    report = verify(url)
    assert (report.problems, report.incomplete) == ([], 0)
    return report.content_sha256


def plan_of_numbers(numbers: Iterable[int], shard_samples: int = 4) -> Plan:
    return Plan(keys_array(200)[list(numbers)], shard_samples, {})


def lacking(numbers: Sequence[int], shard_samples: int = 4) -> Callable[[Plan], Plan | None]:
    """What is to be appended of these samples to a plan."""

    def further(plan: Plan) -> Plan | None:
        left = [number for number in numbers if plan.shard_of(key_of(number)) is None]
        return plan_of_numbers(left, shard_samples) if left else None

    return further


def fill_numbers(
    store: CacheStore, reject: Iterable[int] = (), shards: Iterable[int] | None = None, row: RowSource = make_row
) -> CacheStore:
    """Commit pending shards."""
    for shard in store.pending() if shards is None else shards:
        numbers = [_NUMBERS[key] for key in store.plan.keys_of(shard)]
        rejected = [Rejected(key_of(i), f"sample-{i}/é", "too long") for i in numbers if i in reject]
        store.commit_shard(shard, [row(i) for i in numbers if i not in reject], rejected)
    return store


def cache_of(
    url: str | Path,
    numbers: Iterable[int],
    *,
    shard_samples: int = 4,
    shard_format: str = FASTER,
    spec: CacheSpec = SPEC,
    reject: Iterable[int] = (),
    row: RowSource = make_row,
) -> str:
    """A whole cache of numbered samples, written at once."""
    plan = plan_of_numbers(numbers, shard_samples)
    store = CacheStore.create_or_open(url, spec, plan, shard_format=shard_format, tensors=TENSORS)
    fill_numbers(store, reject, row=row)
    return str(url)


def grow(url: str | Path, numbers: Sequence[int], *, shard_samples: int = 4, reject: Iterable[int] = ()) -> CacheStore:
    """Append samples, and write their shards."""
    return fill_numbers(append_plan(url, lacking(numbers, shard_samples)), reject)


def objects_below(url: str | Path, *folders: str) -> dict[str, bytes]:
    storage = open_storage(url)
    return {f"{f}/{name}": storage.read(f"{f}/{name}") for f in folders for name in storage.names(f)}


def keys_of_numbers(numbers: Iterable[int]) -> np.ndarray:
    return keys_array(200)[list(numbers)]

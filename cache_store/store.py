"""A cache being written: its spec, its plan, and which shards are still to do.

1. ``CacheStore.create_or_open`` freezes spec and plan, or refuses where they differ from what is there.
2. ``pending`` says which shards have no record; ``commit_shard`` writes one of them, whole.
3. ``status`` adds up what the records say.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store import zarr_shard
from alignkd.cache_store.commit import (
    CommitRecord,
    commit,
    committed_numbers,
    object_name,
    read_record,
    read_records,
    record_path,
    sweep,
    write_atomically,
)
from alignkd.cache_store.plan import Plan
from alignkd.cache_store.row import Rejected, Row
from alignkd.cache_store.spec import CacheSpec, check_fingerprint, check_spec

CACHE = "cache.json"


@dataclass(frozen=True)
class Status:
    """How far a cache is. Bytes are those on disk; ``decoded_bytes_by_field`` is what the values take in memory."""

    shards_done: int
    shards: int
    samples_done: int
    samples_rejected: int
    samples: int
    total_bytes: int
    bytes_by_field: Mapping[str, int]
    decoded_bytes_by_field: Mapping[str, int]
    rejected: tuple[Rejected, ...]
    seconds: float
    tokens: int

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.shards_done == self.shards


@dataclass(frozen=True)
class CacheStore:
    """A cache on a local disk."""

    path: Path
    spec: CacheSpec
    plan: Plan

    @classmethod
    def create_or_open(
        cls,
        path: str | Path,
        spec: CacheSpec,
        keys: NDArray[np.uint8],
        *,
        shard_samples: int,
        plan_meta: Mapping[str, Any],
    ) -> CacheStore:
        """Start a cache for the samples with these ``keys`` uint8 [N, 16], or go on with the one that is there.

        FingerprintMismatch where spec or plan differ from those at ``path``; ValueError for a plan that is none, and
        for a folder with commits but without ``cache.json``.
        """
        root = Path(path)
        plan = Plan(keys, shard_samples, plan_meta)
        if (root / CACHE).exists():
            store = open_store(root)
            check_spec(store.spec, spec, cache=str(root))
            check_fingerprint({"plan": store.plan.summary()}, {"plan": plan.summary()}, cache=str(root))
            return store
        if committed_numbers(root):
            raise ValueError(f"{root} has committed shards but no {CACHE}: restore it, or write to another --cache")
        plan.write(root)
        # Last: a cache exists when this file does.
        write_atomically(root / CACHE, spec.to_json().encode())
        return cls(root, spec, plan)

    def pending(self) -> list[int]:
        """Planned shards without a record, ascending."""
        return sorted(set(range(self.plan.shards)) - set(committed_numbers(self.path)))

    def commit_shard(
        self, number: int, rows: Sequence[Row], rejected: Sequence[Rejected], *, seconds: float = 0.0, tokens: int = 0
    ) -> CommitRecord:
        """Write shard ``number`` and return its record; the one that is there already, if another worker was faster.

        ``rows`` and ``rejected`` together are the planned samples of the shard, in any order; rows are stored in the
        order of the plan. ValueError that names the sample for values that do not fit the spec.
        """
        planned = {key: i for i, key in enumerate(self.plan.keys_of(number))}
        assert sorted(planned) == sorted([row.key for row in rows] + [sample.key for sample in rejected])
        if record_path(self.path, number).exists():
            return read_record(self.path, number)
        rows = sorted(rows, key=lambda row: planned[row.key])
        data = zarr_shard.write_shard(self.spec, rows)
        record = CommitRecord(
            number=number,
            object=object_name(number, data, zarr_shard.SUFFIX),
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            keys=tuple(row.key for row in rows),
            rejected=tuple(sorted(rejected, key=lambda sample: planned[sample.key])),
            bytes_by_field=zarr_shard.field_bytes(self.spec, data),
            decoded_bytes_by_field={f.name: sum(row.values[f.name].nbytes for row in rows) for f in self.spec.fields},
            seconds=seconds,
            tokens=tokens,
        )
        commit(self.path, record, data)
        return record

    def sweep(self, *, min_age_s: float = 0.0) -> list[str]:
        """Remove what crashes left behind; see ``commit.sweep`` for ``min_age_s`` with many workers."""
        return sweep(self.path, min_age_s=min_age_s)

    def status(self) -> Status:
        """Sums over all records; CorruptRecord where one is damaged."""
        records = read_records(self.path).values()
        return Status(
            shards_done=len(records),
            shards=self.plan.shards,
            samples_done=sum(record.rows for record in records),
            samples_rejected=sum(len(record.rejected) for record in records),
            samples=self.plan.samples,
            total_bytes=sum(record.bytes for record in records),
            bytes_by_field=_add(record.bytes_by_field for record in records),
            decoded_bytes_by_field=_add(record.decoded_bytes_by_field for record in records),
            rejected=tuple(sample for record in records for sample in record.rejected),
            seconds=sum(record.seconds for record in records),
            tokens=sum(record.tokens for record in records),
        )


def open_store(path: str | Path) -> CacheStore:
    """The cache at ``path``; ValueError where there is none, or where its spec or plan cannot be read."""
    root = Path(path)
    return CacheStore(root, read_spec(root), Plan.load(root))


def read_spec(root: Path) -> CacheSpec:
    """What ``cache.json`` says; ValueError where there is none."""
    if not (root / CACHE).is_file():
        raise ValueError(f"no cache at {root}: found {_found(root)}, expected {CACHE}; run alignkd cache-teacher")
    try:
        return CacheSpec.from_json((root / CACHE).read_text())
    except ValueError as error:
        raise ValueError(f"{root / CACHE}: {error}") from error


def _found(root: Path) -> str:
    if not root.exists():
        return "nothing"
    if not root.is_dir():
        return "a file"
    names = sorted(os.listdir(root))
    return f"a folder with {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "an empty folder"


def _add(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)

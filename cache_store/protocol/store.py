"""A cache being written: its manifest, its plan, and which shards are still to do.

1. ``CacheStore.create_or_open`` freezes spec and plan, or refuses where they differ from what is there.
2. ``pending`` says which shards have no record; ``commit_shard`` writes one of them, whole.
3. ``status`` adds up what the records say.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.protocol import manifest
from alignkd.cache_store.protocol.commit import (
    CommitRecord,
    commit,
    committed_numbers,
    object_name,
    read_record,
    read_records,
    record_name,
    sweep,
)
from alignkd.cache_store.protocol.manifest import Manifest, read_manifest
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.tensors import Tensors, TensorSource, sweep_orphans, write_tensors
from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.cache_store.rows.shard import EncodedRow, Shard, encode_row, pack
from alignkd.cache_store.rows.spec import CacheSpec, check_fingerprint, check_spec
from alignkd.cache_store.storage.contract import Storage
from alignkd.cache_store.storage.open_storage import open_storage

RUNS = "runs"


@dataclass(frozen=True)
class Status:
    """How far a cache is. Bytes are those stored; ``decoded_bytes_by_field`` is what the values take in memory.

    What several rows share is counted once. ``tensor_bytes`` are those of the tensors kept once per cache, and
    ``records`` are the commit records by number: who finished which shard, and when.
    """

    shards: int
    samples: int
    records: Mapping[int, CommitRecord]
    tensor_bytes: int = 0

    @property
    def shards_done(self) -> int:
        """Committed shards."""
        return len(self.records)

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.shards_done == self.shards

    @property
    def samples_done(self) -> int:
        """Rows of all committed shards."""
        return sum(record.rows for record in self.records.values())

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Rejected samples of all committed shards."""
        return tuple(sample for record in self.records.values() for sample in record.rejected)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards, and of the tensors kept once."""
        return sum(record.bytes for record in self.records.values()) + self.tensor_bytes

    @property
    def bytes_by_field(self) -> dict[str, int]:
        """Stored bytes of each field."""
        return _add([record.bytes_by_field for record in self.records.values()])

    @property
    def decoded_bytes_by_field(self) -> dict[str, int]:
        """Bytes of each field's decoded values."""
        return _add([record.decoded_bytes_by_field for record in self.records.values()])

    @property
    def seconds(self) -> float:
        """Time that making all rows took, summed over workers."""
        return sum(record.seconds for record in self.records.values())

    @property
    def tokens(self) -> int:
        """Positions that went through the teacher."""
        return sum(record.tokens for record in self.records.values())


@dataclass(frozen=True)
class CacheStore:
    """A cache that is there, open for writing."""

    storage: Storage
    manifest: Manifest
    plan: Plan

    @property
    def url(self) -> str:
        """Where it lies."""
        return self.storage.url

    @property
    def spec(self) -> CacheSpec:
        """Fields and fingerprint."""
        return self.manifest.spec

    @property
    def tensors(self) -> Tensors:
        """What is kept once for all rows, by name; each is read when it is asked for."""
        return Tensors(self.storage, self.manifest.tensors)

    @classmethod
    def create_or_open(
        cls, url: str | Path, spec: CacheSpec, plan: Plan, *, shard_format: str, tensors: TensorSource = dict
    ) -> CacheStore:
        """Start a cache with this plan, or go on with the one that is there; any number of workers may do so at once.

        ``tensors`` are kept once for all rows, in dtypes of ``tensors.DTYPES``; where they are dear to make, it is a
        function that gives them, called only if there is no cache yet. A cache that is there keeps its own, which are
        not compared with these (two calibrations differ in their last bits): encode rows with ``CacheStore.tensors``.

        FingerprintMismatchError where spec, plan or format differ from those at ``url``; ValueError for a folder with
        commits but without ``cache.json``.
        """
        storage = open_storage(url)
        wanted = Manifest(spec, get_format(shard_format).NAME, plan.summary())
        if storage.size(manifest.NAME) is None:
            if committed_numbers(storage):
                raise ValueError(f"{url} has committed shards but no {manifest.NAME}: restore it, or write to another --cache")
            started = _start(storage, wanted, plan, tensors)
            if started is not None:
                return cls(storage, started, plan)
        found = read_manifest(storage)
        _check_same(found, wanted, cache=str(url))
        return cls(storage, found, plan)

    def pending(self) -> list[int]:
        """Planned shards without a record, ascending."""
        return sorted(set(range(self.plan.shards)) - set(committed_numbers(self.storage)))

    def committed(self, number: int) -> bool:
        """Whether a shard has its record by now."""
        return self.storage.size(record_name(number)) is not None

    def commit_shard(
        self,
        number: int,
        rows: Sequence[Row | EncodedRow],
        rejected: Sequence[Rejected],
        *,
        seconds: float = 0.0,
        tokens: int = 0,
        worker: str = "",
    ) -> CommitRecord:
        """Write shard ``number`` and return its record; the one that is there already, if another worker was faster.

        ``rows`` and ``rejected`` together are the planned samples of the shard, in any order; rows are stored in the
        order of the plan. ValueError that names the sample for values that do not fit the spec, or both samples where
        a per-image field has two shapes for one image.
        """
        order = {key: i for i, key in enumerate(self.plan.keys_of(number))}
        encoded = [row if isinstance(row, EncodedRow) else encode_row(self.spec, row) for row in rows]
        assert sorted(order) == sorted([row.id.key for row in encoded] + [sample.key for sample in rejected])
        packed = pack(self.spec, sorted(encoded, key=lambda row: order[row.id.key]))
        record = CommitRecord(
            number=number,
            object="",
            bytes=0,
            crc32=0,
            sha256="",
            rows=len(rows),
            rejected=tuple(sorted(rejected, key=lambda sample: order[sample.key])),
            decoded_bytes_by_field=packed.decoded_bytes(),
            seconds=round(seconds, 3),
            tokens=tokens,
            finished=round(time.time(), 3),
            worker=worker,
        )
        return self.commit_packed(record, packed)

    def commit_packed(self, record: CommitRecord, shard: Shard) -> CommitRecord:
        """Write a shard that is already encoded; ``record`` says everything about it but what its object is."""
        if self.committed(record.number):
            return read_record(self.storage, record.number)
        shard_format = get_format(self.manifest.shard_format)
        data = shard_format.write_shard(shard)
        about = {
            "object": object_name(record.number, data, shard_format.SUFFIX),
            "bytes": len(data),
            "crc32": zlib.crc32(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes_by_field": shard_format.field_bytes(self.spec, data),
        }
        complete = CommitRecord(**{**vars(record), **about})
        return complete if commit(self.storage, complete, data) else read_record(self.storage, record.number)

    def write_run(self, run: Mapping[str, Any]) -> str:
        """Keep the configuration and versions of a run as ``runs/HASH.json``; its name proves its content."""
        data = (json.dumps(run, indent=2, sort_keys=True, default=str) + "\n").encode()
        name = f"{RUNS}/{hashlib.sha256(data).hexdigest()[:16]}.json"
        self.storage.write(name, data)
        return name

    def sweep(self, *, min_age_s: float) -> list[str]:
        """Remove what crashes left behind; see ``commit.sweep`` for ``min_age_s`` with many workers."""
        swept = sweep(self.storage, min_age_s=min_age_s)
        return swept + sweep_orphans(self.storage, self.manifest.tensors, min_age_s=min_age_s)

    def status(self) -> Status:
        """What all records say; CorruptRecordError where one is damaged."""
        tensor_bytes = sum(entry.bytes for entry in self.manifest.tensors.values())
        return Status(self.plan.shards, self.plan.samples, read_records(self.storage), tensor_bytes)


def open_store(url: str | Path) -> CacheStore:
    """The cache at ``url``; ValueError where there is none, or where its manifest or plan cannot be read."""
    storage = open_storage(url)
    found = read_manifest(storage)
    return CacheStore(storage, found, found.load_plan(storage))


def _start(storage: Storage, wanted: Manifest, plan: Plan, tensors: TensorSource) -> Manifest | None:
    """The manifest, written; None where another worker was first."""
    values = tensors if isinstance(tensors, Mapping) else tensors()
    # Making them may have taken minutes.
    if storage.size(manifest.NAME) is not None:
        return None
    complete = replace(wanted, tensors=write_tensors(storage, values))
    plan.write(storage)
    # Last, and only if no other worker was first: a cache exists when this object does.
    return complete if storage.write(manifest.NAME, complete.to_json().encode()) else None


def _check_same(found: Manifest, wanted: Manifest, *, cache: str) -> None:
    check_spec(found.spec, wanted.spec, cache=cache)
    check_fingerprint(_comparable(found), _comparable(wanted), cache=cache)


def _comparable(manifest: Manifest) -> dict[str, Any]:
    """Which sample is in which shard, and in which format: not where the planner found the samples."""
    plan = {name: manifest.plan[name] for name in ("samples", "shard_samples")}
    return {"format": manifest.shard_format, "plan": plan | {"keys": manifest.plan["arrays"]["keys"]}}


def _add(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)

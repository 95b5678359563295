"""Write a cache: its manifest, its plan, and its shards, one after the other.

1. ``CacheStore.create_or_open`` freezes spec and plan. It refuses a cache whose spec or plan differs.
2. ``pending`` lists the shards without a record; ``commit_shard`` writes one of them, whole.
3. ``status`` adds up the records.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignkd.cache_store.formats.registry import get_format
from alignkd.cache_store.protocol import manifest
from alignkd.cache_store.protocol.commit import commit, read_record, read_records, sweep
from alignkd.cache_store.protocol.further_plans import sweep_arrays
from alignkd.cache_store.protocol.manifest import Manifest, read_manifest
from alignkd.cache_store.protocol.names import (
    committed_numbers,
    marked_numbers,
    object_name,
    object_names,
    record_name,
    require_own_folders,
    run_name,
)
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.protocol.retries import commit_again, remove_out_of_date, superseded
from alignkd.cache_store.protocol.status import Status
from alignkd.cache_store.protocol.tensors import Tensors, TensorSource, sweep_orphans, write_tensors
from alignkd.cache_store.rows.encode import EncodedRow, concatenate_rows, encode_row
from alignkd.cache_store.rows.row import Rejected, Row
from alignkd.cache_store.rows.shard import Shard
from alignkd.cache_store.rows.spec import CacheSpec, check_fingerprint, check_spec
from alignkd.cache_store.storage import Storage, open_storage
from alignkd.errors import CacheError


@dataclass(frozen=True)
class CacheStore:
    """An existing cache, open for writing."""

    storage: Storage
    manifest: Manifest
    plan: Plan

    @property
    def url(self) -> str:
        """Where the cache is."""
        return self.storage.url

    @property
    def spec(self) -> CacheSpec:
        """Fields and fingerprint."""
        return self.manifest.spec

    @property
    def tensors(self) -> Tensors:
        """What is stored once for all rows, by name; each tensor is read when it is accessed."""
        return Tensors(self.storage, self.manifest.tensors)

    @classmethod
    def create_or_open(
        cls, url: str | Path, spec: CacheSpec, plan: Plan, *, shard_format: str, tensors: TensorSource = dict
    ) -> CacheStore:
        """Start a cache with this plan, or continue the existing one; any number of workers may do so at once.

        ``tensors`` are stored once for all rows, in dtypes of ``tensors.DTYPES``. If they are expensive to make, pass a
        function that returns them: it is called only if there is no cache yet. An existing cache keeps its own tensors. They
        are not compared with these, since two calibrations differ in their last bits: encode rows with ``CacheStore.tensors``.

        Where the existing cache has further plans, what is returned knows of the shards of the first plan alone.

        Raises:
            FingerprintMismatchError: spec, plan or format differ from those of the cache at ``url``.
            CacheError: the cache is damaged, or has committed shards but no ``cache.json``.
            ConfigError: an unknown format, or a URL that cannot be opened.
            StorageAccessError: a folder of the cache is a link to another place.
        """
        storage = open_storage(url)
        require_own_folders(storage)
        wanted = Manifest(spec, get_format(shard_format).NAME, plan.summary())
        if storage.size(manifest.NAME) is None:
            if committed_numbers(storage):
                raise CacheError(f"{url} has committed shards but no {manifest.NAME}: restore it, or write to another --cache")
            started = _start(storage, wanted, plan, tensors)
            if started is not None:
                return cls(storage, started, plan)
        found = read_manifest(storage)
        _check_same(found, wanted, cache=str(url))
        return cls(storage, found, plan)

    def pending(self) -> list[int]:
        """Planned shards without a record, and those that are to be made again, ascending."""
        return sorted((set(range(self.plan.shards)) - set(committed_numbers(self.storage, self.plan.shards))) | self.retrying())

    def retrying(self) -> set[int]:
        """Committed shards that are to be made again; see :mod:`alignkd.cache_store.protocol.retries`."""
        marked = (number for number in marked_numbers(self.storage) if number < self.plan.shards)
        return {number for number in marked if superseded(self.storage, number) is not None}

    def committed(self, number: int) -> bool:
        """Whether a shard has a record by now, and need not be made again."""
        return self.storage.size(record_name(number)) is not None and superseded(self.storage, number) is None

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
        """Write shard ``number`` and return its record, or the existing record if another worker was faster.

        ``rows`` and ``rejected`` together are the planned samples of the shard, in any order; rows are stored in the
        order of the plan.

        Raises:
            CacheError: a row does not match the spec (names the sample), or a per-image field has two shapes for one image
                (names both samples).
        """
        order = {key: i for i, key in enumerate(self.plan.keys_of(number))}
        encoded = [row if isinstance(row, EncodedRow) else encode_row(self.spec, row) for row in rows]
        assert sorted(order) == sorted([row.id.key for row in encoded] + [sample.key for sample in rejected])
        shard = concatenate_rows(self.spec, sorted(encoded, key=lambda row: order[row.id.key]))
        record = CommitRecord(
            number=number,
            object="",
            bytes=0,
            crc32=0,
            sha256="",
            rows=len(rows),
            rejected=tuple(sorted(rejected, key=lambda sample: order[sample.key])),
            decoded_bytes_by_field=shard.decoded_bytes(),
            seconds=round(seconds, 3),
            tokens=tokens,
            finished=round(time.time(), 3),
            worker=worker,
        )
        return self.commit_encoded(record, shard)

    def commit_encoded(self, record: CommitRecord, shard: Shard) -> CommitRecord:
        """Write an encoded shard. ``record`` needs no name, sizes and checksums of the object: they are filled in."""
        if self.committed(record.number):
            return read_record(self.storage, record.number)
        if self.storage.size(manifest.NAME) is None:
            raise CacheError(
                f"{self.url} has no {manifest.NAME} any more: the cache was removed or moved while this worker wrote to it."
                " Bring it back, or write another cache with alignkd cache-teacher"
            )
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
        if (before := superseded(self.storage, record.number)) is not None:
            again = commit_again(self.storage, complete, before, data)
            return complete if again else read_record(self.storage, record.number)
        return complete if commit(self.storage, complete, data) else read_record(self.storage, record.number)

    def write_run(self, run: Mapping[str, Any]) -> str:
        """Store the configuration and versions of a run as ``runs/HASH.json``; the name has the hash of the content."""
        data = (json.dumps(run, indent=2, sort_keys=True, default=str) + "\n").encode()
        name = run_name(data)
        self.storage.write(name, data)
        return name

    def sweep(self, *, min_age_s: float) -> list[str]:
        """Remove what crashes left; returns the names. See :func:`alignkd.cache_store.protocol.commit.sweep`."""
        swept = sweep(self.storage, min_age_s=min_age_s)
        remove_out_of_date(self.storage)
        swept += sweep_orphans(self.storage, self.manifest.tensors, min_age_s=min_age_s)
        return swept + (sweep_arrays(self.storage, self.manifest.plan, min_age_s=min_age_s) if self.manifest.grown else [])

    def status(self) -> Status:
        """What all records say; CorruptRecordError if one is damaged."""
        tensor_bytes = sum(entry.bytes for entry in self.manifest.tensors.values())
        records = read_records(self.storage, committed_numbers(self.storage, self.plan.shards))
        listed = set(object_names(self.storage))
        # A listing may be older than the record: each object that it lacks is looked for by name.
        unlisted = [record for record in records.values() if record.object not in listed]
        missing = tuple(record.number for record in unlisted if self.storage.size(record.object) is None)
        return Status(self.plan.shards, self.plan.samples, records, tensor_bytes, missing)


def open_store(url: str | Path) -> CacheStore:
    """The cache at ``url``.

    Raises:
        CacheError: there is no cache, or its manifest or plan is damaged.
        ConfigError: a URL that cannot be opened.
    """
    storage = open_storage(url)
    found = read_manifest(storage)
    return CacheStore(storage, found, found.load_plan(storage))


def _start(storage: Storage, wanted: Manifest, plan: Plan, tensors: TensorSource) -> Manifest | None:
    """Write tensors, plan and manifest; returns the manifest, or None if another worker was first."""
    values = tensors if isinstance(tensors, Mapping) else tensors()
    # Another worker may have written the manifest meanwhile: making tensors can take minutes.
    if storage.size(manifest.NAME) is not None:
        return None
    complete = replace(wanted, tensors=write_tensors(storage, values))
    plan.write(storage)
    # Last, and only if no other worker was first: a cache exists when its manifest does.
    return complete if storage.write(manifest.NAME, complete.to_json().encode()) else None


def _check_same(found: Manifest, wanted: Manifest, *, cache: str) -> None:
    check_spec(found.spec, wanted.spec, cache=cache)
    check_fingerprint(_comparable(found), _comparable(wanted), cache=cache)


def _comparable(manifest: Manifest) -> dict[str, Any]:
    """Which sample is in which shard, and the format; not where the planner found the samples."""
    plan = {name: manifest.plan[name] for name in ("samples", "shard_samples")}
    return {"format": manifest.shard_format, "plan": plan | {"keys": manifest.plan["arrays"]["keys"]}}

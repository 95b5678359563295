"""Read a cache: rows by key, in any order. Nothing is used before its checksum was compared."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.errors import MissingRowError
from alignkd.cache_store.protocol.commit import read_records
from alignkd.cache_store.protocol.manifest import read_manifest
from alignkd.cache_store.protocol.names import committed_numbers
from alignkd.cache_store.protocol.open_shard import open_shard, read_shapes, row_keys
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.protocol.shard_cache import THREADS, ShardCache
from alignkd.cache_store.protocol.tensors import Tensors
from alignkd.cache_store.rows.checks import RowChecks
from alignkd.cache_store.rows.encode import EncodedRow
from alignkd.cache_store.rows.layout import empty_layout
from alignkd.cache_store.rows.row import EncodedField, Rejected, Row, is_key
from alignkd.cache_store.rows.shard import Shard
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.storage import open_storage
from alignkd.errors import ConfigError

_PARALLEL_READS = 16


class CacheReader:
    """The rows of the shards that were committed when the reader was made.

    Opening it reads the manifest, the plan and the commit records, but no shard and no tensor. The ``max_shards`` most
    recently used shards stay in memory, those being fetched ahead included. ``tensors`` has, by name, what is stored once
    for all rows. The reader holds no open file or connection: it may be pickled (without its shards) and forked.

    Raises:
        ConfigError: a URL that cannot be opened, or ``max_shards`` below 1.
        CacheError: there is no cache, or its manifest or plan is damaged.
        CorruptRecordError: a commit record is damaged.
    """

    def __init__(self, url: str | Path, *, max_shards: int = 8) -> None:
        if max_shards < 1:
            raise ConfigError(f"shards to keep in memory: found {max_shards}, expected at least 1")
        self.storage = open_storage(url)
        manifest = read_manifest(self.storage)
        self.spec: CacheSpec = manifest.spec
        self.shard_format = manifest.shard_format
        listed = committed_numbers(self.storage)  # before the plan: a shard that is committed was planned earlier
        self.plan: Plan = manifest.load_plan(self.storage)
        self.tensors = Tensors(self.storage, manifest.tensors)
        self.max_shards = max_shards
        numbers = committed_numbers(self.storage, self.plan.shards)
        self.records = read_records(self.storage, [n for n in numbers if n < self.plan.shards or n in listed])
        self.rejected = {sample.key: sample for record in self.records.values() for sample in record.rejected}
        self._fields = {field.name: field for field in self.spec.fields}
        self._checks = RowChecks(self.spec)
        self._checked: dict[int, dict[str, bytearray]] = {}
        self._shards = ShardCache(self._fetch, max_shards)

    def _fetch(self, number: int) -> Shard:
        record = self.records[number]
        # Bytes with the same checksum need not be checked again in the next epoch.
        done = self._checked.setdefault(number, {})
        return open_shard(self.storage, self.spec, record, row_keys(self.plan, record), checks=self._checks, done=done)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": {}}

    @property
    def url(self) -> str:
        """Where the cache is."""
        return self.storage.url

    def again(self, *, max_shards: int) -> CacheReader:
        """Another reader of the same cache, with shards of its own in memory."""
        return CacheReader(self.url, max_shards=max_shards)

    def __len__(self) -> int:
        return sum(record.rows for record in self.records.values())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._number(key) is not None

    def __iter__(self) -> Iterator[str]:
        """Keys in the order of the plan."""
        for record in self.records.values():
            yield from row_keys(self.plan, record)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The settings that determine the targets."""
        return dict(self.spec.fingerprint)

    def shards_of(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The shard of each key ``[N, 16]``; -1 if no committed shard has its sample. A rejected sample has a shard."""
        places = self.plan.locate(keys)
        shards = np.where(places >= 0, self.plan.shards_at(places), -1)
        committed = np.zeros(self.plan.shards, dtype=bool)
        committed[[number for number in self.records if number < self.plan.shards]] = True
        return np.where((places >= 0) & committed[shards], shards, -1)

    def shard_of(self, key: str) -> int:
        """Number of the shard that has the row of ``key``.

        Raises:
            MissingRowError: no shard has it; the message says why.
        """
        number = self._number(key)
        if number is None:
            raise MissingRowError(f"no row {key!r} in the cache at {self.url}: {self._why_missing(key)}")
        return number

    def row(self, key: str, fields: Container[str] | None = None) -> Row:
        """The decoded targets of one sample: all fields, or only ``fields``.

        Raises:
            MissingRowError: the sample has no row.
            CorruptShardError: its shard is damaged.
        """
        return self._row(key, self._shard_of_row(key), fields)

    def encoded_fields(self, key: str, fields: Iterable[str]) -> dict[str, EncodedField]:
        """``fields`` of one sample, still encoded: small integers that a device can decode. Raises as :meth:`row`."""
        shard, i = self._shards.row_of(self._shard_of_row(key), key)
        return shard.encoded_fields(i, fields)

    def encoded_row(self, key: str, fields: Iterable[str]) -> EncodedRow:
        """``fields`` of one sample as they are stored: views into its shard. Raises as :meth:`row`."""
        shard, i = self._shards.row_of(self._shard_of_row(key), key)
        names = list(fields)
        parts = {name: {part: shard.part(name, part, i) for part in empty_layout(self._fields[name])} for name in names}
        return EncodedRow(shard.ids[i], {name: shard.shape(name, i) for name in names}, parts)

    def rows(self, keys: Iterable[str], fields: Container[str] | None = None) -> Iterator[Row]:
        """Rows in the order of ``keys``; their shards are fetched ahead. Raises as :meth:`row`."""
        wanted = list(keys)
        shards = self._shards_of(wanted)
        coming = list(dict.fromkeys(shards))
        place = {number: i for i, number in enumerate(coming)}
        for key, number in zip(wanted, shards, strict=True):
            self.prefetch(coming[place[number] : place[number] + 1 + THREADS])
            yield self._row(key, number, fields)

    def first_dimensions(self, field: str) -> NDArray[np.int32]:
        """The first dimension of ``field`` (not per image) for each planned sample, ``[samples]``; -1 for one without a row.

        It reads a few kilobytes of each shard, and no values: the lengths of all samples, without their targets.

        Raises:
            CorruptShardError: a shard is missing or damaged.
        """
        found = np.full(self.plan.samples, -1, dtype=np.int32)

        def read(record: CommitRecord) -> None:
            keys = row_keys(self.plan, record)
            shapes = read_shapes(self.storage, self.spec, record, keys, field)
            rejected = {sample.key for sample in record.rejected}
            planned = self.plan.positions_of(record.number)
            kept = [i for i, key in zip(planned, self.plan.keys_of(record.number), strict=True) if key not in rejected]
            found[kept] = shapes[:, 0]

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            list(pool.map(read, self.records.values()))
        return found

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to fetch shards that will be needed soon, as many as there is room for."""
        self._shards.prefetch(numbers)

    def shard(self, number: int) -> Shard:
        """A committed shard, from memory or from storage; CorruptShardError if it is damaged."""
        return self._shards.get(number)

    def find(self, sample_id: str) -> list[str]:
        """Keys of all rows and rejected samples with this id (there may be several). Reads every shard."""
        rejected = [key for key, sample in self.rejected.items() if sample.sample_id == sample_id]
        rows = [row.key for number in self.records for row in self.shard(number).ids if row.sample_id == sample_id]
        return rows + rejected

    def _shards_of(self, keys: Sequence[str]) -> list[int]:
        if all(map(is_key, keys)) and self.rejected.keys().isdisjoint(keys):
            found: list[int] = self.shards_of(np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 16)).tolist()
            if -1 not in found:
                return found
        # One by one, for the message about the first missing one.
        return [self.shard_of(key) for key in keys]

    def _shard_of_row(self, key: str) -> int:
        """As :meth:`shard_of`. The shards in memory are searched first: the row is usually there, and the plan is slower."""
        number = self._shards.holder(key)
        return self.shard_of(key) if number is None else number

    def _number(self, key: str) -> int | None:
        number = self.plan.shard_of(key) if is_key(key) else None
        return number if number in self.records and key not in self.rejected else None

    def _row(self, key: str, number: int, fields: Container[str] | None) -> Row:
        shard, i = self._shards.row_of(number, key)
        return shard.row(i, fields)

    def _why_missing(self, key: str) -> str:
        if key in self.rejected:
            sample: Rejected = self.rejected[key]
            return f"sample {sample.sample_id!r} was rejected when the cache was written: {sample.reason}"
        planned = self.plan.shard_of(key) if is_key(key) else None
        if planned is not None:
            return f"it is planned for shard {planned}, which was not committed yet; run alignkd cache-teacher again"
        return (
            "it was never planned. A key is made of the sample's id, image references and conversation: "
            "has one of them changed since, or was the cache written from another data file?"
        )

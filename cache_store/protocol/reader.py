"""A cache being read: rows by key, in any order. Nothing is believed before its checksum was compared."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.formats.registry import format_of
from alignkd.cache_store.protocol.commit import CommitRecord, read_records
from alignkd.cache_store.protocol.manifest import read_manifest
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.tensors import Tensors
from alignkd.cache_store.rows.row import EncodedField, Rejected, Row, is_key
from alignkd.cache_store.rows.shard import CorruptShardError, Shard
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.storage.contract import Storage
from alignkd.cache_store.storage.open_storage import open_storage

_LOADERS = 2


class MissingRowError(KeyError):
    """A key that has no row; the message says why."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, its line breaks escaped.
        return str(self.args[0])


class CacheReader:
    """Rows of the shards that were committed when the reader was made.

    Opening it reads the manifest, the plan's keys and the commit records, no shard and no tensor. The ``max_shards``
    shards used last stay in memory, those being fetched ahead counted among them. ``tensors`` has what is kept once for
    all rows, by name. It holds no open file or connection: it may be pickled (without its shards) and forked.
    ``verify=False`` leaves out the checksum of each shard, not the comparison with spec and record.

    ValueError where there is no cache, CorruptRecordError where a commit record is damaged.
    """

    def __init__(self, url: str | Path, *, max_shards: int = 8, verify: bool = True) -> None:
        if max_shards < 1:
            raise ValueError(f"shards to keep in memory: found {max_shards}, expected at least 1")
        self.storage = open_storage(url)
        manifest = read_manifest(self.storage)
        self.spec: CacheSpec = manifest.spec
        self.shard_format = manifest.shard_format
        self.plan: Plan = manifest.load_plan(self.storage)
        self.tensors = Tensors(self.storage, manifest.tensors)
        self.max_shards = max_shards
        self.verify = verify
        self.records = read_records(self.storage)
        self.rejected = {sample.key: sample for record in self.records.values() for sample in record.rejected}
        self._forget()

    def _forget(self) -> None:
        self._shards: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._rows: dict[int, dict[str, int]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        unshared = ("_shards", "_rows", "_pool", "_process")
        return {name: value for name, value in self.__dict__.items() if name not in unshared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def url(self) -> str:
        """Where the cache lies."""
        return self.storage.url

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
        """What the targets were made from."""
        return dict(self.spec.fingerprint)

    def shards_of(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Shard of each key ``[N, 16]``; -1 where no committed shard has its sample. A rejected sample has a shard."""
        places = self.plan.locate(keys)
        shards = places // self.plan.shard_samples
        committed = np.zeros(self.plan.shards, dtype=bool)
        committed[[number for number in self.records if number < self.plan.shards]] = True
        return np.where((places >= 0) & committed[shards], shards, -1)

    def shard_of(self, key: str) -> int:
        """Number of the shard that holds ``key``; MissingRowError where none does."""
        number = self._number(key)
        if number is None:
            raise MissingRowError(f"no row {key!r} in the cache at {self.url}: {self._why_missing(key)}")
        return number

    def row(self, key: str, fields: Container[str] | None = None) -> Row:
        """The targets of one sample, decoded (all fields, or those named).

        MissingRowError where it has none, CorruptShardError where its shard is damaged.
        """
        return self._row(key, self._shard_of_row(key), fields)

    def encoded_fields(self, key: str, fields: Iterable[str]) -> dict[str, EncodedField]:
        """Fields of one sample as they are stored, not decoded: small integers for a device to decode. Raises as ``row``."""
        number = self._shard_of_row(key)
        shard = self.shard(number)
        return shard.encoded_fields(self._rows[number][key], fields)

    def rows(self, keys: Iterable[str], fields: Container[str] | None = None) -> Iterator[Row]:
        """Rows in the order of ``keys``; the shards they need are fetched ahead of their use."""
        wanted = list(keys)
        shards = self._shards_of(wanted)
        coming = list(dict.fromkeys(shards))
        place = {number: i for i, number in enumerate(coming)}
        for key, number in zip(wanted, shards, strict=True):
            self.prefetch(coming[place[number] : place[number] + 1 + _LOADERS])
            yield self._row(key, number, fields)

    def _shards_of(self, keys: Sequence[str]) -> list[int]:
        if all(map(is_key, keys)) and self.rejected.keys().isdisjoint(keys):
            found: list[int] = self.shards_of(np.frombuffer(bytes.fromhex("".join(keys)), np.uint8).reshape(-1, 16)).tolist()
            if -1 not in found:
                return found
        # One by one, for the message about the first that is missing.
        return [self.shard_of(key) for key in keys]

    def _shard_of_row(self, key: str) -> int:
        """As ``shard_of``; the shards in memory, where it mostly is, are asked before the plan, which takes longer."""
        for number, rows in self._rows.items():
            if key in rows:
                return number
        return self.shard_of(key)

    def _number(self, key: str) -> int | None:
        number = self.plan.shard_of(key) if is_key(key) else None
        return number if number in self.records and key not in self.rejected else None

    def _row(self, key: str, number: int, fields: Container[str] | None) -> Row:
        shard = self.shard(number)
        return shard.row(self._rows[number][key], fields)

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to fetch shards that will be needed soon, as many as there is room for."""
        for number in list(dict.fromkeys(numbers))[: self.max_shards]:
            self._future(number)

    def shard(self, number: int) -> Shard:
        """A committed shard, from memory or from its storage; CorruptShardError where it is damaged."""
        future = self._future(number)
        try:
            shard = future.result()
        except BaseException:
            self._shards.pop(number, None)
            raise
        if number not in self._rows:
            self._rows[number] = {key: i for i, key in enumerate(shard.keys)}
        return shard

    def _future(self, number: int) -> Future[Shard]:
        if self._process != os.getpid():
            # The threads that fetch did not come along through the fork.
            self._forget()
        if number not in self._shards:
            self._make_room()
            self._pool = self._pool or ThreadPoolExecutor(_LOADERS, thread_name_prefix="cache-reader")
            record = self.records[number]
            self._shards[number] = self._pool.submit(
                open_shard, self.storage, self.spec, record, row_keys(self.plan, record), verify=self.verify
            )
        self._shards.move_to_end(number)
        return self._shards[number]

    def _make_room(self) -> None:
        """Forget shards before another is fetched, so that never more than ``max_shards`` are in memory."""
        while len(self._shards) >= self.max_shards:
            gone, future = self._shards.popitem(last=False)
            self._rows.pop(gone, None)
            if not future.cancel():
                wait([future])  # one that is being opened is in memory soon, too

    def find(self, sample_id: str) -> list[str]:
        """Keys of the rows and rejected samples with this id, of which there may be several. Reads every shard."""
        rejected = [key for key, sample in self.rejected.items() if sample.sample_id == sample_id]
        rows = [row.key for number in self.records for row in self.shard(number).ids if row.sample_id == sample_id]
        return rows + rejected

    def _why_missing(self, key: str) -> str:
        if key in self.rejected:
            sample: Rejected = self.rejected[key]
            return f"sample {sample.sample_id!r} was rejected when the cache was written: {sample.reason}"
        planned = self.plan.shard_of(key) if is_key(key) else None
        if planned is not None:
            return f"it is planned for shard {planned}, which was not committed yet; run alignkd cache-teacher again"
        return (
            "it was never planned. A key is made of the sample's id, image references and conversation: "
            "has one of them changed since, or is this another data file than the cache was written from?"
        )


def row_keys(plan: Plan, record: CommitRecord) -> tuple[str, ...]:
    """Keys of a committed shard's rows, in order: the planned ones but the rejected; CorruptShardError where none can be."""
    if record.number >= plan.shards:
        raise CorruptShardError(f"shard {record.number} is committed but not in the plan of {plan.shards} shards")
    rejected = {sample.key for sample in record.rejected}
    planned = plan.keys_of(record.number)
    keys = tuple(key for key in planned if key not in rejected)
    if len(keys) != record.rows or len(keys) + len(rejected) != len(planned):
        raise CorruptShardError(f"shard {record.number}: its record does not hold the samples of the plan")
    return keys


def open_shard(
    storage: Storage,
    spec: CacheSpec,
    record: CommitRecord,
    keys: tuple[str, ...],
    *,
    verify: bool = True,
    audit: bool = False,
) -> Shard:
    """Read a committed shard and compare it with its record; CorruptShardError that says what is lost and what to do.

    ``audit`` compares the sha256 as well, and what the shard's format does not need for reading.
    """
    try:
        data = storage.read(record.object)
        _check_bytes(data, record, verify, audit)
        shard_format = format_of(record.object)
        shard = shard_format.read_shard(spec, data)
        if shard.keys != keys:
            raise CorruptShardError("its keys are not those of plan and record")
        if audit:
            shard_format.audit(data, shard)
    except (FileNotFoundError, ValueError) as error:
        some = ", ".join(keys[:3]) + (", ..." if record.rows > 3 else "")
        raise CorruptShardError(
            f"shard {record.number} of the cache at {storage.url} cannot be used: {record.object}: {error}. "
            f"It holds {record.rows} samples ({some}). Run alignkd cache verify to see all damage, alignkd cache repair"
            " to drop it, and cache-teacher to rebuild it."
        ) from error
    return shard


def _check_bytes(data: bytes, record: CommitRecord, verify: bool, audit: bool) -> None:
    if len(data) != record.bytes:
        raise CorruptShardError(f"found {len(data)} bytes, expected {record.bytes}")
    if verify and (crc32 := zlib.crc32(data)) != record.crc32:
        raise CorruptShardError(f"found crc32 {crc32:08x}, expected {record.crc32:08x}")
    if audit and (sha256 := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise CorruptShardError(f"found sha256 {sha256[:12]}..., expected {record.sha256[:12]}...")

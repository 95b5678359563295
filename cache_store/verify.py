"""Audit a cache: every record, every shard, every row; and one digest that says what it holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alignkd.cache_store.commit import (
    CommitRecord,
    CorruptRecord,
    committed_numbers,
    foreign_names,
    object_names,
    read_record,
    shard_number,
)
from alignkd.cache_store.reader import open_shard
from alignkd.cache_store.shard import CorruptShard, Shard
from alignkd.cache_store.store import CacheStore, open_store


@dataclass(frozen=True)
class VerifyReport:
    """What an audit found.

    ``rows`` and ``rejected`` count samples of shards without a problem. Planned shards that are not done yet are no
    problem, nor are ``strays``: shard objects that no record names, left by a crash or about to be committed.
    ``content_sha256`` is the same for every cache that holds the same rows, however they are sharded, ordered or
    compressed; "" after a quick audit.
    """

    problems: list[str]
    rows: int
    rejected: int
    shards_done: int
    shards_planned: int
    strays: int
    content_sha256: str

    @property
    def incomplete(self) -> int:
        """Planned shards without a record."""
        return self.shards_planned - self.shards_done


def verify(path: str | Path, *, quick: bool = False) -> VerifyReport:
    """Audit the cache at ``path``; quick compares records and sizes alone. ValueError where there is no cache."""
    store = open_store(path)
    numbers = committed_numbers(store.path)
    problems = [f"{name}: neither a shard nor a record" for name in foreign_names(store.path)]
    digests: list[bytes] = []
    sound: list[CommitRecord] = []
    recorded: set[str] = set()
    for number in numbers:
        try:
            record = read_record(store.path, number)
            recorded.add(record.object)
            _check_record(store, record)
            if quick:
                _check_size(store, record)
            else:
                digests.extend(_audit_rows(open_shard(store.path, store.spec, record)))
        except (CorruptRecord, CorruptShard) as error:
            problems.append(str(error))
        else:
            sound.append(record)
    loose = [name for name in object_names(store.path) if name not in recorded and shard_number(name) is not None]
    foreign = [name for name in loose if not _is_planned(store, shard_number(name))]
    return VerifyReport(
        problems=problems + [f"{name}: a shard that is not in the plan" for name in foreign],
        rows=sum(record.rows for record in sound),
        rejected=sum(len(record.rejected) for record in sound),
        shards_done=sum(_is_planned(store, number) for number in numbers),
        shards_planned=store.plan.shards,
        strays=len(loose) - len(foreign),
        content_sha256="" if quick else hashlib.sha256(b"".join(sorted(digests))).hexdigest(),
    )


def row_digest(shard: Shard, i: int) -> bytes:
    """Key and sha256 of what row ``i`` holds: names, dtypes, codecs, shapes and encoded bytes of its fields."""
    key, encoded = shard.ids[i].key, shard.encoded(i)
    fields = sorted(shard.spec.fields, key=lambda field: field.name)
    described = [[f.name, f.dtype, f.codec, shard.shape(f.name, i), sorted(encoded[f.name])] for f in fields]
    digest = hashlib.sha256(json.dumps([key, described]).encode())
    for field in fields:
        for part in sorted(encoded[field.name]):
            digest.update(encoded[field.name][part].tobytes())
    return bytes.fromhex(key) + digest.digest()


def _is_planned(store: CacheStore, number: int | None) -> bool:
    return number is not None and number < store.plan.shards


def _check_record(store: CacheStore, record: CommitRecord) -> None:
    if not _is_planned(store, record.number):
        raise CorruptRecord(f"shard {record.number} is committed but not in the plan of {store.plan.shards} shards")
    samples = sorted((*record.keys, *(sample.key for sample in record.rejected)))
    if samples != sorted(store.plan.keys_of(record.number)):
        raise CorruptRecord(f"shard {record.number}: its record does not hold the samples of the plan")


def _check_size(store: CacheStore, record: CommitRecord) -> None:
    path = store.path / record.object
    found = path.stat().st_size if path.is_file() else None
    if found != record.bytes:
        has = "nothing" if found is None else f"{found} bytes"
        raise CorruptShard(f"shard {record.number}: {record.object}: found {has}, expected {record.bytes} bytes")


def _audit_rows(shard: Shard) -> Iterator[bytes]:
    """Digests of all rows; CorruptShard where one does not decode to what the spec says."""
    for i in range(len(shard)):
        row = shard.row(i)
        for field in shard.spec.fields:
            value = row.values[field.name]
            if value.shape != shard.shape(field.name, i) or value.dtype != field.numpy_dtype:
                raise CorruptShard(f"row {row.key}, field {field.name!r}: decodes to {value.dtype} {value.shape}")
        yield row_digest(shard, i)

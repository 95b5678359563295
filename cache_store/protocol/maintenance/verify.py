"""Verify a cache: every record, every shard, every row; and one digest of its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from alignkd.cache_store.errors import CorruptRecordError, CorruptShardError, DamagedTensorError, UnusableObjectError
from alignkd.cache_store.limits import MAX_JSON_BYTES, max_decoded_bytes
from alignkd.cache_store.protocol.commit import read_record
from alignkd.cache_store.protocol.further_plans import further_objects, orphan_arrays
from alignkd.cache_store.protocol.names import (
    PLAN,
    RUNS,
    committed_numbers,
    foreign_names,
    name_hash,
    object_names,
    our_names,
    record_name,
    run_name,
    shard_number,
    temporary_names,
)
from alignkd.cache_store.protocol.open_shard import open_shard, row_keys
from alignkd.cache_store.protocol.plan import plan_objects
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.protocol.tensors import check_size, is_orphan, read_tensor, unlisted
from alignkd.cache_store.rows.checks import RowChecks
from alignkd.cache_store.rows.shard import Shard

_SHOWN = 3
_FOREIGN = "{}: neither a shard nor a record, and not one of alignkd's names: left as it is; move it to another place"


@dataclass(frozen=True)
class Problem:
    """A message, the objects that ``repair`` removes, in this order, and the keys of the affected samples.

    What has not exactly one of alignkd's names is told, and is not among the objects: somebody may miss it.
    ``beyond_repair``: every sample needs the objects, and nothing in the cache can rebuild them; they are not removed.
    """

    message: str
    objects: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    beyond_repair: bool = False

    def __str__(self) -> str:
        if not self.keys:
            return self.message
        some = ", ".join(self.keys[:_SHOWN]) + (", ..." if len(self.keys) > _SHOWN else "")
        return f"{self.message} [{len(self.keys)} samples: {some}]"


@dataclass(frozen=True)
class VerifyReport:
    """The result of an audit.

    ``rows`` and ``rejected`` count samples of shards without a problem. Planned shards without a record are not a problem.
    ``strays`` are not one either: temporary files, and objects that no record names, left by a crash or about to be
    committed. ``content_sha256`` is the same for every cache with the same rows and tensors, whatever its shards, their
    order, compression or format; "" after a quick audit.
    """

    problems: list[Problem]
    rows: int
    rejected: int
    shards_done: int
    shards_planned: int
    strays: list[str]
    content_sha256: str

    @property
    def incomplete(self) -> int:
        """Planned shards without a record."""
        return self.shards_planned - self.shards_done


def verify(url: str | Path, *, quick: bool = False, on_shard: Callable[[], None] | None = None) -> VerifyReport:
    """Audit the cache at ``url``; ``quick`` compares only records and sizes. ``on_shard`` is called after each shard.

    Raises:
        CacheError: there is no cache, or its manifest or plan is damaged, which everything else is compared with.
    """
    store = open_store(url)
    checks = RowChecks(store.spec, thorough=True)
    objects = object_names(store.storage)
    numbers = committed_numbers(store.storage, store.plan.shards)
    orphans = _orphans(store)
    problems = [*_not_of_this_cache(store, orphans), *_damaged_runs(store), *_damaged_tensors(store, quick)]
    digests: list[bytes] = []
    sound: list[CommitRecord] = []
    recorded: dict[int, str] = {}
    for number in numbers:
        try:
            record = read_record(store.storage, number)
            recorded[number] = record.object
            digests.extend(_audit(store, record, None if quick else checks))
            sound.append(record)
        except (CorruptRecordError, CorruptShardError, FileNotFoundError) as error:
            # Which object a damaged record named is unknown.
            known = [recorded[number]] if number in recorded else [n for n in objects if shard_number(n) == number]
            problems.append(_damaged(store, number, known, str(error)))
        if on_shard is not None:
            on_shard()
    named = {*recorded.values(), *(name for problem in problems for name in problem.objects)}
    loose = [name for name in objects if name not in named]
    strays = [name for name in loose if _is_stray(store, name, recorded)]
    return VerifyReport(
        problems=problems + [p for name in loose if name not in strays and (p := _loose(store, name))],
        rows=sum(record.rows for record in sound),
        rejected=sum(len(record.rejected) for record in sound),
        shards_done=sum(number < store.plan.shards for number in numbers),
        shards_planned=store.plan.shards,
        strays=[*temporary_names(store.storage), *orphans, *strays],
        content_sha256="" if quick else hashlib.sha256(b"".join([*sorted(digests), *_tensor_digests(store)])).hexdigest(),
    )


def row_digest(shard: Shard, i: int) -> bytes:
    """The key of row ``i`` and a sha256 of its names, dtypes, codecs, shapes and encoded bytes."""
    key, encoded = shard.ids[i].key, shard.encoded(i)
    fields = sorted(shard.spec.fields, key=lambda field: field.name)
    metadata = [[f.name, f.dtype, f.codec, shard.shape(f.name, i), sorted(encoded[f.name])] for f in fields]
    digest = hashlib.sha256(json.dumps([*shard.ids[i], metadata]).encode())
    for field in fields:
        for part in sorted(encoded[field.name]):
            digest.update(encoded[field.name][part].tobytes())
    return bytes.fromhex(key) + digest.digest()


def _tensor_digests(store: CacheStore) -> Iterator[bytes]:
    """One digest per tensor, by name: with other tensors the same rows mean something else."""
    for name, entry in sorted(store.manifest.tensors.items()):
        yield hashlib.sha256(json.dumps([name, entry.to_dict()], sort_keys=True).encode()).digest()


def _audit(store: CacheStore, record: CommitRecord, checks: RowChecks | None) -> list[bytes]:
    """Digests of a shard's rows; CorruptShardError if it does not match its record and the plan, or a row is impossible.

    Without ``checks`` only sizes are compared, and there are no digests.
    """
    keys = row_keys(store.plan, record)
    if checks is None:
        found = store.storage.size(record.object)
        if found != record.bytes:
            has = "nothing" if found is None else f"{found} bytes"
            raise CorruptShardError(f"shard {record.number}: {record.object}: found {has}, expected {record.bytes} bytes")
        return []
    return list(_audit_rows(open_shard(store.storage, store.spec, record, keys, audit=True, checks=checks)))


def _audit_rows(shard: Shard) -> Iterator[bytes]:
    """Digests of all rows; CorruptShardError if a row does not decode to the shape and dtype of its fields."""
    for i in range(len(shard)):
        row = shard.row(i)
        for field in shard.spec.fields:
            value = row.values[field.name]
            if value.shape != shard.shape(field.name, i) or value.dtype != field.numpy_dtype:
                raise CorruptShardError(f"row {row.key}, field {field.name!r}: decodes to {value.dtype} {value.shape}")
        yield row_digest(shard, i)


def _damaged(store: CacheStore, number: int, objects: list[str], message: str) -> Problem:
    keys = store.plan.keys_of(number) if number < store.plan.shards else []
    # The record first: without it, the shard is simply not done.
    return Problem(message, (record_name(number), *objects), tuple(keys))


def _is_stray(store: CacheStore, name: str, recorded: Mapping[int, str]) -> bool:
    """Whether an object without a record may be from a worker that was killed between object and record.

    If another worker has committed the shard since, then only an object whose bytes have the hash in its name, and which is
    not a copy of a committed one.
    """
    number = shard_number(name)
    if number is None or number >= store.plan.shards:
        return False
    if number not in recorded:
        return True
    try:
        data = store.storage.read(name, max_decoded_bytes())
    except (FileNotFoundError, UnusableObjectError):
        return False
    copied = any(name_hash(other) == name_hash(name) for other in recorded.values())
    return not copied and name_hash(name) == hashlib.sha256(data).hexdigest()[:12]


def _loose(store: CacheStore, name: str) -> Problem | None:
    number = shard_number(name)
    if number is None:
        return None
    if number >= store.plan.shards:
        return Problem(f"{name}: a shard that is not in the plan of {store.plan.shards} shards", (name,))
    return Problem(f"{name}: a second object of shard {number}: a copy, or damaged", (name,))


def _not_of_this_cache(store: CacheStore, orphans: list[str]) -> list[Problem]:
    known = {*_plan_objects(store), *orphans}
    plans = [name for name in our_names(store.storage, PLAN) if name not in known]
    tensors = [name for name in unlisted(store.storage, store.manifest.tensors) if name not in orphans]
    return [
        *(Problem(_FOREIGN.format(name)) for name in foreign_names(store.storage)),
        *(Problem(f"{name}: not part of this cache's plan", (name,)) for name in plans),
        *(Problem(f"{name}: not one of this cache's tensors", (name,)) for name in tensors),
    ]


def _plan_objects(store: CacheStore) -> list[str]:
    found = plan_objects(store.manifest.plan)
    return found + (further_objects(store.storage) if store.manifest.grown else [])


def _orphans(store: CacheStore) -> list[str]:
    """Tensors and arrays of plans that a run wrote and did not come to use."""
    found = [name for name in unlisted(store.storage, store.manifest.tensors) if is_orphan(store.storage, name)]
    return found + (orphan_arrays(store.storage, store.manifest.plan) if store.manifest.grown else [])


def _damaged_tensors(store: CacheStore, quick: bool) -> Iterator[Problem]:
    for entry in store.manifest.tensors.values():
        try:
            (check_size if quick else read_tensor)(store.storage, entry)
        except DamagedTensorError as error:
            yield Problem(str(error), (entry.object,), beyond_repair=True)


def _damaged_runs(store: CacheStore) -> Iterator[Problem]:
    for name in our_names(store.storage, RUNS):
        if not _is_run(store, name):
            yield Problem(f"{name}: not a run's configuration, or a damaged one; no row depends on it", (name,))


def _is_run(store: CacheStore, name: str) -> bool:
    try:
        return run_name(store.storage.read(name, MAX_JSON_BYTES)) == name
    except (FileNotFoundError, UnusableObjectError):  # a folder, or something else that is no file
        return False

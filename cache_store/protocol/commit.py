"""Commit a shard, and sweep what a crash left: the only place that writes a commit record.

1. The shard's bytes are written to ``shards/000012-HASH.SUFFIX``. The name has a hash of the bytes, so two workers that
   write the same shard never overwrite each other's object.
2. The record is written last, to ``commits/000012.json``, with the checksum of the shard and one of its own. The first
   record of a shard stays; a second one is discarded.

A shard that no record names does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence

from alignkd.cache_store.errors import CorruptRecordError, UnusableObjectError
from alignkd.cache_store.limits import MAX_JSON_BYTES
from alignkd.cache_store.protocol.names import (
    committed_numbers,
    object_names,
    record_name,
    require_own_folders,
    shard_number,
    temporary_names,
)
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.storage import Storage, read_all

_log = logging.getLogger(__name__)


def commit(storage: Storage, record: CommitRecord, data: bytes) -> bool:
    """Write a shard's bytes, then its record. False if another worker's record was first.

    A crash at any point leaves both, or nothing that counts.
    """
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    fresh = put(storage, record.object, data)
    first = storage.write(record_name(record.number), record.to_json().encode())
    if first and (not fresh or storage.size(record.object) is None):
        # Another worker may have taken the object for a stray, and swept it a moment ago.
        put(storage, record.object, data)
    if fresh and not first and read_record(storage, record.number).object != record.object:
        storage.delete(record.object)
    if first:
        _log.debug("committed shard %d: %s, %d rows, %d bytes", record.number, record.object, record.rows, record.bytes)
    else:
        _log.info("shard %d was committed by another worker first", record.number)
    return first


def put(storage: Storage, name: str, data: bytes) -> bool:
    """Make sure that an object, whose name has the hash of its bytes, exists; False if it did already."""
    if storage.write(name, data):
        return True
    with contextlib.suppress(FileNotFoundError):
        if storage.read(name) == data:
            return False
    # Other bytes under this name can only be damage.
    storage.delete(name)
    storage.write(name, data)
    return True


def read_record(storage: Storage, number: int) -> CommitRecord:
    """The record of a committed shard.

    Raises:
        CorruptRecordError: it is damaged; the message says what to do.
    """
    with _told_as_damage(storage, number):
        return _parse(storage.read(record_name(number), MAX_JSON_BYTES), number)


def read_records(storage: Storage, numbers: Sequence[int] | None = None) -> dict[int, CommitRecord]:
    """The records of all committed shards, by number.

    Raises:
        CorruptRecordError: one of them is damaged.
    """
    numbers = committed_numbers(storage) if numbers is None else numbers
    texts, records = read_all(storage, [record_name(number) for number in numbers], MAX_JSON_BYTES), {}
    for number in numbers:
        with _told_as_damage(storage, number):
            records[number] = _parse(next(texts), number)
    return records


def sweep(storage: Storage, *, min_age_s: float) -> list[str]:
    """Remove strays that are at least ``min_age_s`` old; returns their names.

    While other workers write, ``min_age_s`` must be longer than a commit takes, or their unfinished work is swept.

    Only what has exactly the name of a temporary file or of a shard object is a stray. Anything else is left as it is.

    Raises:
        CorruptRecordError: a record that may name one of them is damaged.
        StorageAccessError: a folder of the cache is a link to another place.
    """
    require_own_folders(storage)
    swept = []
    for name in older_than(storage, _stray_names(storage), min_age_s):
        if not _recorded(storage, name):
            storage.delete(name)
            swept.append(name)
            _log.info("swept %s: no commit record names it", name)
    return swept


def older_than(storage: Storage, names: Sequence[str], min_age_s: float) -> list[str]:
    """Those of some objects that were written at least ``min_age_s`` ago by the storage's own clock."""
    if not min_age_s or not names:
        return list(names)
    lead_s = storage.clock_lead_s()
    return [name for name in names if storage.age_s(name) - lead_s >= min_age_s]


def _stray_names(storage: Storage) -> list[str]:
    """Temporary files, and shard objects that no record names: left by a crash, or about to be committed.

    The only object of a committed shard is the one that its record names, so few records are read, if any.
    """
    numbers = {name: number for name in object_names(storage) if (number := shard_number(name)) is not None}
    objects = Counter(numbers.values())
    # Records are listed after the objects, so that a commit in between is seen.
    committed = set(committed_numbers(storage))
    doubtful = [name for name, number in numbers.items() if number not in committed or objects[number] > 1]
    return [*temporary_names(storage), *(name for name in doubtful if not _recorded(storage, name))]


def _recorded(storage: Storage, name: str) -> bool:
    """Whether a record names this object by now: a worker that resumes may use what a crash left."""
    number = shard_number(name)
    return number is not None and storage.size(record_name(number)) is not None and read_record(storage, number).object == name


def _parse(data: bytes, number: int) -> CommitRecord:
    record = CommitRecord.from_json(data.decode())
    if record.number != number:
        raise CorruptRecordError(f"it is the record of shard {record.number}")
    return record


@contextlib.contextmanager
def _told_as_damage(storage: Storage, number: int) -> Iterator[None]:
    """Raise CorruptRecordError, with what to do, for whatever is wrong with the bytes of a record."""
    try:
        yield
    except (CorruptRecordError, UnicodeDecodeError, UnusableObjectError) as error:
        raise CorruptRecordError(
            f"{storage.url}/{record_name(number)}: {error}. Run this, then cache-teacher again: alignkd cache repair"
            f" {shlex.quote(storage.url)}"
        ) from error

"""Shards that are made again although they are committed, because samples of theirs that were rejected may be usable by now.

A mark, ``retries/000012.json``, names the object that the shard's record had. The record and its rows stay valid until the
shard is committed again: then its record is replaced in one step, and the mark and the object of before are removed. A kill at
any point leaves the old record or the new one. A mark whose object the record does not name is out of date and counts nothing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection

from alignkd.cache_store.protocol.commit import put, read_record, read_records
from alignkd.cache_store.protocol.names import marked_numbers, record_name, retry_name
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.rows.reasons import reason_class
from alignkd.cache_store.rows.row import Rejected
from alignkd.cache_store.storage import Storage

_LARGEST = 10_000
"""Bytes; a mark has about 60."""


def mark_rejected(storage: Storage, reasons: Collection[str] = ()) -> list[Rejected]:
    """Mark the shards that rejected samples for reasons of these classes, or for any; returns those samples.

    Raises:
        CorruptRecordError: a commit record is damaged.
    """
    found: list[Rejected] = []
    for number, record in read_records(storage).items():
        again = [sample for sample in record.rejected if not reasons or reason_class(sample.reason) in reasons]
        if again:
            storage.replace(retry_name(number), (json.dumps({"object": record.object}) + "\n").encode())
            found += again
    return found


def superseded(storage: Storage, number: int) -> CommitRecord | None:
    """The record that the next commit of a shard replaces; None where the shard is not to be made again."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        marked = json.loads(storage.read(retry_name(number), _LARGEST))["object"]
        record = read_record(storage, number)
        return record if record.object == marked else None
    return None


def commit_again(storage: Storage, record: CommitRecord, before: CommitRecord, data: bytes) -> bool:
    """Write a shard's bytes, then its record in place of ``before``. False if another worker did so first."""
    put(storage, record.object, data)
    current = read_record(storage, record.number)
    if current.object != before.object:
        if current.object != record.object:
            storage.delete(record.object)
        return False
    storage.replace(record_name(record.number), record.to_json().encode())
    storage.delete(retry_name(record.number))
    if before.object != record.object:
        storage.delete(before.object)
    return True


def remove_out_of_date(storage: Storage) -> None:
    """Remove marks that count nothing: a kill left them."""
    for number in marked_numbers(storage):
        if superseded(storage, number) is None:
            storage.delete(retry_name(number))

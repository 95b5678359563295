"""One committed shard, read from storage and compared with its record."""

from __future__ import annotations

import hashlib
import shlex
import zlib

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.errors import CorruptShardError, UnusableObjectError
from alignkd.cache_store.formats.registry import format_of
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.rows.checks import RowChecks
from alignkd.cache_store.rows.shard import Shard
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.cache_store.storage import Storage
from alignkd.cache_store.storage.object_file import open_object

_DIRECTORY_BYTES = 64 << 10
"""The end of a shard that is read first: the directory of a zip archive lies there."""


def row_keys(plan: Plan, record: CommitRecord) -> tuple[str, ...]:
    """Keys of a committed shard's rows, in order: the planned keys without the rejected ones.

    Raises:
        CorruptShardError: plan and record contradict each other.
    """
    if record.number >= plan.shards:
        raise CorruptShardError(f"shard {record.number} is committed but not in the plan of {plan.shards} shards")
    rejected = {sample.key for sample in record.rejected}
    planned = plan.keys_of(record.number)
    keys = tuple(key for key in planned if key not in rejected)
    if len(keys) != record.rows or len(keys) + len(rejected) != len(planned):
        raise CorruptShardError(f"shard {record.number}: its record does not have the samples of the plan")
    return keys


def open_shard(
    storage: Storage,
    spec: CacheSpec,
    record: CommitRecord,
    keys: tuple[str, ...],
    *,
    checks: RowChecks,
    audit: bool = False,
    done: dict[str, bytearray] | None = None,
) -> Shard:
    """Read a committed shard, compare it with its record, and its rows with what a teacher could have written.

    ``audit`` also compares the sha256, and whatever the shard's format does not need for reading. ``checks``: those of
    ``spec``. ``done``: the values that were checked before in the same bytes.

    Raises:
        CorruptShardError: the shard is missing or damaged, or holds what no teacher gives; the message says what is lost and
            what to do. The shard raises it later where it finds that only when a row is read.
    """
    try:
        data = storage.read(record.object, record.bytes)
        _check_bytes(data, record, audit)
        shard_format = format_of(record.object)
        shard = shard_format.read_shard(spec, data)
        if shard.keys != keys:
            raise CorruptShardError("its keys are not those of plan and record")
        if audit:
            shard_format.audit(data, shard)
    except FileNotFoundError as error:
        raise unusable_shard(storage, record, keys, "it is missing") from error
    except (CorruptShardError, UnusableObjectError) as error:
        raise unusable_shard(storage, record, keys, str(error)) from error
    checks.check(shard, {} if done is None else done, lambda why: unusable_shard(storage, record, keys, why))
    return shard


def read_shapes(
    storage: Storage, spec: CacheSpec, record: CommitRecord, keys: tuple[str, ...], field: str
) -> NDArray[np.int32]:
    """The decoded shape of ``field`` in each row of a committed shard, ``[rows, ndim]``, from a few kilobytes of it.

    Only the size of the shard is compared with its record: whoever uses a row opens the shard, which compares the rest.

    Raises:
        CorruptShardError: the shard is missing or damaged; the message says what is lost and what to do.
    """
    try:
        if (found := storage.size(record.object)) != record.bytes:
            raise CorruptShardError("it is missing" if found is None else f"found {found} bytes, expected {record.bytes}")
        with open_object(storage, record.object, record.bytes, tail=_DIRECTORY_BYTES) as file:
            return format_of(record.object).read_shapes(spec, file, len(keys), field)
    except FileNotFoundError as error:
        raise unusable_shard(storage, record, keys, "it is missing") from error
    except (CorruptShardError, UnusableObjectError) as error:
        raise unusable_shard(storage, record, keys, str(error)) from error


def unusable_shard(storage: Storage, record: CommitRecord, keys: tuple[str, ...], why: str) -> CorruptShardError:
    """The error about a shard that cannot be used: what is lost and what to do."""
    some = ", ".join(keys[:3]) + (", ..." if record.rows > 3 else "")
    return CorruptShardError(
        f"shard {record.number} of the cache at {storage.url} cannot be used: {record.object}: {why}. "
        f"It has {record.rows} samples ({some}). Run this to remove it, then cache-teacher to rebuild it:"
        f" alignkd cache repair {shlex.quote(storage.url)}"
    )


def _check_bytes(data: bytes, record: CommitRecord, audit: bool) -> None:
    if len(data) != record.bytes:
        raise CorruptShardError(f"found {len(data)} bytes, expected {record.bytes}")
    if (crc32 := zlib.crc32(data)) != record.crc32:
        raise CorruptShardError(f"found crc32 {crc32:08x}, expected {record.crc32:08x}")
    if audit and (sha256 := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise CorruptShardError(f"found sha256 {sha256[:12]}..., expected {record.sha256[:12]}...")

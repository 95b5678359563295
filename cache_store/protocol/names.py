"""The names of the objects of a cache, relative to its root."""

from __future__ import annotations

import hashlib
import re

from alignkd.cache_store.storage import Storage
from alignkd.cache_store.storage.contract import TEMPORARY

SHARDS = "shards"
COMMITS = "commits"
PLAN = "plan"
RUNS = "runs"
TENSORS = "tensors"
WORKERS = "workers"

_OBJECT = re.compile(rf"{SHARDS}/(\d{{6,}})-([0-9a-f]{{12}})(\.[a-z]+)+")
_RECORD = re.compile(r"(\d{6,})\.json")


def object_name(number: int, data: bytes, suffix: str) -> str:
    """Name of a shard object."""
    return f"{SHARDS}/{number:06d}-{hashlib.sha256(data).hexdigest()[:12]}{suffix}"


def shard_number(name: str) -> int | None:
    """Number of the shard that an object is, from its name; None if the name is not a shard object's."""
    match = _OBJECT.fullmatch(name)
    return int(match[1]) if match else None


def name_hash(name: str) -> str | None:
    """The hash in a shard object's name: the first 12 characters of the sha256 of its bytes."""
    match = _OBJECT.fullmatch(name)
    return match[2] if match else None


def record_name(number: int) -> str:
    """Name of the commit record of a shard, whether it exists or not."""
    return f"{COMMITS}/{number:06d}.json"


def committed_numbers(storage: Storage) -> list[int]:
    """Numbers of the shards that have a record, ascending; no record is read."""
    return sorted(int(match[1]) for name in storage.names(COMMITS) if (match := _RECORD.fullmatch(name)))


def object_names(storage: Storage) -> list[str]:
    """Everything in the shards' folder except temporary files."""
    return [f"{SHARDS}/{name}" for name in storage.names(SHARDS) if not name.startswith(TEMPORARY)]


def temporary_names(storage: Storage) -> list[str]:
    """Temporary files, which a crash left or another worker is writing."""
    found = []
    for folder in ("", PLAN, RUNS, TENSORS, WORKERS, SHARDS, COMMITS):
        prefix = f"{folder}/" if folder else ""
        found += [prefix + name for name in storage.names(folder) if name.startswith(TEMPORARY)]
    return found


def foreign_names(storage: Storage) -> list[str]:
    """What lies among shards and records but is neither."""
    records = [name for name in storage.names(COMMITS) if not name.startswith(TEMPORARY)]
    return [name for name in object_names(storage) if shard_number(name) is None] + [
        f"{COMMITS}/{name}" for name in records if not _RECORD.fullmatch(name)
    ]

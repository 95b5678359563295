"""The names of the objects of a cache, relative to its root.

A name is parsed back, and counts only if it is exactly what is written for what it says: ``0000001.json`` is no record.
"""

from __future__ import annotations

import hashlib
import re

from alignkd.cache_store.formats.registry import FORMATS
from alignkd.cache_store.storage import Storage
from alignkd.cache_store.storage.contract import is_temporary

SHARDS = "shards"
COMMITS = "commits"
PLAN = "plan"
RUNS = "runs"
TENSORS = "tensors"
RETRIES = "retries"
WORKERS = "workers"
FOLDERS = (PLAN, RUNS, TENSORS, RETRIES, WORKERS, SHARDS, COMMITS)

_NUMBER = r"(\d{6}|[1-9]\d{6,})"
_SUFFIX = "|".join(re.escape(shard_format.SUFFIX) for shard_format in FORMATS.values())
_OBJECT = re.compile(rf"{SHARDS}/{_NUMBER}-([0-9a-f]{{12}})({_SUFFIX})", re.ASCII)
_RECORD = re.compile(rf"{_NUMBER}\.json", re.ASCII)
_RUN = re.compile(r"[0-9a-f]{16}\.json")
_PLAN_PART = re.compile(rf"[a-z][a-z0-9_]{{0,63}}-[0-9a-f]{{12}}\.npy|{_NUMBER}\.json", re.ASCII)
_TENSOR = re.compile(r"[a-z][a-z0-9_.]{0,199}-[0-9a-f]{12}\.npy")
_REPORT = re.compile(r"[0-9a-f]{16}-\d{8}\.json", re.ASCII)

_OURS = {PLAN: _PLAN_PART, RUNS: _RUN, TENSORS: _TENSOR, WORKERS: _REPORT, RETRIES: _RECORD, COMMITS: _RECORD}


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


def retry_name(number: int) -> str:
    """Name of the mark of a shard that is to be made again, whether it exists or not."""
    return f"{RETRIES}/{number:06d}.json"


def marked_numbers(storage: Storage) -> list[int]:
    """Numbers of the shards that have such a mark, ascending; no mark is read."""
    return sorted(int(match[1]) for name in storage.names(RETRIES) if (match := _RECORD.fullmatch(name)))


def further_plan_name(number: int) -> str:
    """Name of the record of a further plan, counted from 1, whether it exists or not."""
    return f"{PLAN}/{number:06d}.json"


def further_plan_numbers(storage: Storage) -> list[int]:
    """Numbers of the further plans that a listing tells, ascending; no record is read."""
    return sorted(int(match[1]) for name in storage.names(PLAN) if (match := _RECORD.fullmatch(name)))


def run_name(data: bytes) -> str:
    """Name of the configuration of a run, from its bytes."""
    return f"{RUNS}/{hashlib.sha256(data).hexdigest()[:16]}.json"


def committed_numbers(storage: Storage, planned: int = 0) -> list[int]:
    """Numbers of the shards that have a record, ascending; no record is read.

    ``planned``: shards of the plan. Where a listing may lag, the record of each of them that it lacks is looked for by name.
    """
    found = {int(match[1]) for name in storage.names(COMMITS) if (match := _RECORD.fullmatch(name))}
    doubtful = set(range(planned)) - found if storage.listing_may_lag else ()
    return sorted(found.union(number for number in doubtful if storage.size(record_name(number)) is not None))


def object_names(storage: Storage) -> list[str]:
    """All shard objects, recorded or not."""
    names = (f"{SHARDS}/{name}" for name in storage.names(SHARDS))
    return [name for name in names if shard_number(name) is not None]


def temporary_names(storage: Storage) -> list[str]:
    """Temporary files, which a crash left or another worker is writing."""
    found = []
    for folder in ("", *FOLDERS):
        prefix = f"{folder}/" if folder else ""
        found += [prefix + name for name in storage.names(folder) if is_temporary(name)]
    return found


def our_names(storage: Storage, folder: str) -> list[str]:
    """What lies in a folder under a name that alignkd gives there, temporary files left out."""
    if folder == SHARDS:
        return object_names(storage)
    return [f"{folder}/{name}" for name in storage.names(folder) if _OURS[folder].fullmatch(name)]


def foreign_names(storage: Storage) -> list[str]:
    """What lies in the folders of a cache under other names: not ours, so that nobody here removes it."""
    found = []
    for folder in FOLDERS:
        ours = set(our_names(storage, folder))
        names = [name for name in storage.names(folder) if not is_temporary(name)]
        found += [f"{folder}/{name}" for name in names if f"{folder}/{name}" not in ours]
    return found


def require_own_folders(storage: Storage) -> None:
    """Refuse to write or remove anything where a folder of the cache is a link to another place.

    Raises:
        StorageAccessError: one is.
    """
    for folder in FOLDERS:
        storage.require_own(folder)

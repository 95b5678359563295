"""Every kind of damage that an audit finds, done to a full cache of ten samples in three shards, the fifth rejected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cache_samples import all_names, flip, overwrite

from alignkd.cache_store.protocol.commit import read_record
from alignkd.cache_store.protocol.names import object_names, record_name
from alignkd.cache_store.storage import Storage

# Shard that is touched (None: no shard), name that the message has to hold, and what is done.
Damage = tuple[int | None, str, Callable[[Storage], None]]


def _shard(storage: Storage, number: int) -> str:
    return object_names(storage)[number]


def _truncate(storage: Storage, name: str, keep: int | None) -> None:
    overwrite(storage, name, storage.read(name)[:keep])


def _rewrite_record(storage: Storage, source: int, target: int | None = None, **changes: object) -> None:
    record = replace(read_record(storage, source), **changes)
    name = record_name(source if target is None else target)
    storage.delete(name)
    storage.write(name, record.to_json().encode())


def _copy(storage: Storage, source: str, target: str) -> None:
    storage.delete(target)
    assert storage.write(target, storage.read(source))


def _outside(storage: Storage) -> None:
    name = _shard(storage, 0)
    other = name.replace("000000", "000007")
    _copy(storage, name, other)
    _rewrite_record(storage, 0, 7, number=7, object=other)


def _second(storage: Storage) -> str:
    number, _, suffix = _shard(storage, 1).partition("-")
    return f"{number}-0123456789ab{suffix[12:]}"


def _run(storage: Storage) -> str:
    return next(name for name in all_names(storage) if name.startswith("runs/"))


DAMAGES: dict[str, Damage] = {
    "a bit in a shard": (1, "shards/000001-", lambda s: flip(s, _shard(s, 1), 0.7, bit=3)),
    "a shard without its end": (0, "shards/000000-", lambda s: _truncate(s, _shard(s, 0), -1)),
    "an empty shard": (2, "shards/000002-", lambda s: _truncate(s, _shard(s, 2), 0)),
    "a longer shard": (2, "shards/000002-", lambda s: overwrite(s, _shard(s, 2), s.read(_shard(s, 2)) + b"x")),
    "a lost shard": (1, "shards/000001-", lambda s: s.delete(_shard(s, 1))),
    "another shard's bytes": (0, "shards/000000-", lambda s: _copy(s, _shard(s, 1), _shard(s, 0))),
    "a bit in a record": (1, "commits/000001.json", lambda s: flip(s, record_name(1), 0.4)),
    "a record without its end": (0, "commits/000000.json", lambda s: _truncate(s, record_name(0), -2)),
    "an empty record": (2, "commits/000002.json", lambda s: _truncate(s, record_name(2), 0)),
    "another shard's record": (2, "commits/000002.json", lambda s: _copy(s, record_name(0), record_name(2))),
    "a record of fewer samples": (0, "samples of the plan", lambda s: _rewrite_record(s, 0, rows=3)),
    "a record without the rejected": (1, "samples of the plan", lambda s: _rewrite_record(s, 1, rejected=())),
    "a record of a shard that is not planned": (None, "shard 7 is committed but not in the plan", _outside),
    "a shard that is not planned": (None, "shards/000009-", lambda s: _copy(s, "cache.json", "shards/000009-0123456789ab.tar")),
    "a second object": (None, "a second object of shard 1", lambda s: _copy(s, _shard(s, 1), _second(s))),
    "another plan's array": (None, "plan/keys-0123", lambda s: _copy(s, "cache.json", "plan/keys-0123456789ab.npy")),
    "a damaged orphan among tensors": (
        None,
        "tensors/head-0123456789ab.npy",
        lambda s: _copy(s, "cache.json", "tensors/head-0123456789ab.npy"),
    ),
    "another file under the name of a run": (None, "runs/0123", lambda s: _copy(s, "cache.json", "runs/0123456789abcdef.json")),
    "a bit in the record of a run": (None, "runs/", lambda s: flip(s, _run(s), 0.2)),
}

NOTES = [
    "shards/notes.txt",
    "shards/000000-0123456789ab.zip",
    "shards/000000-0123456789AB.tar",
    "shards/0000001-0123456789ab.tar",
    "shards/.tmp-notes",
    "commits/000000.json~",
    "commits/0000001.json",
    "commits/\u0660\u0660\u0660\u0660\u0660\u0660.json",
    "commits/.tmp-0123456789abcde",
    "plan/keys.npy",
    "tensors/head.npy",
    "runs/readme",
    "runs/0123456789abcdef.json.bak",
]
"""Names that look like those of a cache's objects, and that alignkd gives to none."""

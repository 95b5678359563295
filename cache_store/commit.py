"""What exists: the only place that renames, fsyncs or writes a commit record.

1. The shard's bytes go to ``shards/000012-HASH.zarr.zip``. The name holds a hash of the bytes, so two workers that
   write the same shard never write over each other.
2. The record goes to ``commits/000012.json``, last, with the checksum of the shard and one of its own.

Each is written to a temporary name, fsynced, renamed, and its folder fsynced. What no record names does not exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkd.cache_store.row import Rejected, is_key

SHARDS = "shards"
COMMITS = "commits"
TEMPORARY = ".tmp-"

_OBJECT = re.compile(rf"{SHARDS}/(\d{{6,}})-[0-9a-f]{{12}}(\.[a-z]+)+")
_RECORD = re.compile(r"(\d{6,})\.json")


class CorruptRecord(ValueError):  # noqa: N818 - a name says what is the matter
    """A commit record that is damaged."""


@dataclass(frozen=True)
class CommitRecord:
    """One committed shard.

    ``object`` is the shard's name relative to the cache, ``bytes`` and ``sha256`` are those of the whole object,
    ``keys`` the key of each row in order. Per field: bytes in the object, and bytes of the decoded values.
    ``seconds`` is the time that making the rows took, ``tokens`` the number of tokens that went in.
    """

    number: int
    object: str
    bytes: int
    sha256: str
    keys: tuple[str, ...]
    rejected: tuple[Rejected, ...] = ()
    bytes_by_field: Mapping[str, int] = field(default_factory=dict)
    decoded_bytes_by_field: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def rows(self) -> int:
        """Number of rows in the shard."""
        return len(self.keys)

    def to_json(self) -> str:
        """One line of JSON, with its own checksum."""
        content = {**dataclasses.asdict(self), "rows": self.rows}
        return _canonical({**content, "record_sha256": _checksum(content)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CommitRecord:
        """The record of ``to_json``; CorruptRecord where a single character differs."""
        try:
            content = json.loads(text)
            checksum, rows = content.pop("record_sha256"), content["rows"]
            if checksum != _checksum(content):
                raise CorruptRecord("its checksum does not match")
            del content["rows"]
            rejected = tuple(Rejected(**entry) for entry in content.pop("rejected"))
            record = cls(**{**content, "keys": tuple(content["keys"]), "rejected": rejected})
            record._check(rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptRecord(f"damaged commit record: {error}") from error
        return record

    def _check(self, rows: int) -> None:
        # The checksum tells damage, not malice: a name such as ../../x would have the reader open it.
        if shard_number(self.object) != self.number:
            raise CorruptRecord(f"shard {self.number} cannot be the object {self.object!r}")
        if len(self.keys) != rows or not all(map(is_key, self.keys)):
            raise CorruptRecord(f"expected {rows} keys, found {len(self.keys)} or some that are none")


def object_name(number: int, data: bytes, suffix: str) -> str:
    """Name of a shard object relative to the cache."""
    return f"{SHARDS}/{number:06d}-{hashlib.sha256(data).hexdigest()[:12]}{suffix}"


def shard_number(name: str) -> int | None:
    """Number of the shard that an object is, from its name; None where the name is not one of ours."""
    match = _OBJECT.fullmatch(name)
    return int(match[1]) if match else None


def record_path(root: Path, number: int) -> Path:
    """Where the record of a shard is, or would be."""
    return root / COMMITS / f"{number:06d}.json"


def commit(root: Path, record: CommitRecord, data: bytes) -> None:
    """Write a shard's bytes, then its record. A crash at any point leaves either both, or nothing that exists."""
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    write_atomically(root / record.object, data)
    write_atomically(record_path(root, record.number), record.to_json().encode())


def committed_numbers(root: Path) -> list[int]:
    """Numbers of the shards that have a record, ascending; no record is opened."""
    return sorted(int(match[1]) for name in _names(root / COMMITS) if (match := _RECORD.fullmatch(name)))


def read_record(root: Path, number: int) -> CommitRecord:
    """The record of a committed shard; CorruptRecord that says what to do where it is damaged."""
    path = record_path(root, number)
    try:
        record = CommitRecord.from_json(path.read_bytes().decode())
        if record.number != number:
            raise CorruptRecord(f"it is the record of shard {record.number}")
    except (CorruptRecord, UnicodeDecodeError) as error:
        raise CorruptRecord(f"{path}: {error}. Delete it and run alignkd cache-teacher to redo this shard.") from error
    return record


def read_records(root: Path) -> dict[int, CommitRecord]:
    """Records of all committed shards, by number; CorruptRecord at the first that is damaged."""
    return {number: read_record(root, number) for number in committed_numbers(root)}


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``path`` so that it holds all of ``data`` or is as it was before, whatever happens in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def sweep(root: Path, *, min_age_s: float = 0.0) -> list[str]:
    """Remove temporaries and shard objects that no record names; returns their names relative to the cache.

    With other workers writing at the same time, ``min_age_s`` (seconds since the last change) has to be longer than
    a commit takes, or their work in flight is swept as well. CorruptRecord, and nothing removed, where a record is
    damaged: what it names would be lost.
    """
    strays = [name for name in stray_names(root) if _age_s(root / name) >= min_age_s]
    for name in strays:
        (root / name).unlink(missing_ok=True)
    return strays


def stray_names(root: Path) -> list[str]:
    """Temporaries, and shard objects that no record names: left over, or about to be committed by another worker."""
    folders = ("", "plan", SHARDS, COMMITS)
    temporaries = [
        (Path(folder) / name).as_posix() for folder in folders for name in _names(root / folder) if name.startswith(TEMPORARY)
    ]
    objects = [name for name in object_names(root) if shard_number(name) is not None]
    # Records are read after the objects are listed, so that a commit in between is seen.
    recorded = {record.object for record in read_records(root).values()}
    return temporaries + [name for name in objects if name not in recorded]


def object_names(root: Path) -> list[str]:
    """Everything in the folder of shards but temporaries, relative to the cache."""
    return [f"{SHARDS}/{name}" for name in _names(root / SHARDS) if not name.startswith(TEMPORARY)]


def foreign_names(root: Path) -> list[str]:
    """What lies among shards and records without being either, relative to the cache."""
    records = [name for name in _names(root / COMMITS) if not name.startswith(TEMPORARY)]
    return [name for name in object_names(root) if shard_number(name) is None] + [
        f"{COMMITS}/{name}" for name in records if not _RECORD.fullmatch(name)
    ]


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _age_s(path: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folder; its rename is on disk when it returns.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))

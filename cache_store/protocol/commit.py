"""What exists: the names of objects, and the only place that writes a commit record.

1. The shard's bytes go to ``shards/000012-HASH.SUFFIX``. The name holds a hash of the bytes, so two workers that
   write the same shard never write over each other.
2. The record goes to ``commits/000012.json``, last, with the checksum of the shard and one of its own. The first
   record of a shard stays; a second is discarded.

What no record names does not exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignkd.cache_store.rows.row import Rejected, is_key
from alignkd.cache_store.storage.contract import TEMPORARY, Storage
from alignkd.cache_store.storage.open_storage import read_all

SHARDS = "shards"
COMMITS = "commits"

_OBJECT = re.compile(rf"{SHARDS}/(\d{{6,}})-([0-9a-f]{{12}})(\.[a-z]+)+")
_RECORD = re.compile(r"(\d{6,})\.json")


class CorruptRecordError(ValueError):
    """A commit record that is damaged."""


@dataclass(frozen=True)
class CommitRecord:
    """One committed shard.

    ``object`` is the shard's name relative to the cache; ``bytes``, ``crc32`` (fast: compared whenever the shard is
    opened) and ``sha256`` (compared by an audit) are those of the whole object. Its
    ``rows`` are the shard's planned samples but the ``rejected`` ones, in the order of the plan. Per field: bytes in
    the object, and bytes of the decoded values. ``seconds`` is the time that making the rows took, ``tokens`` the
    number of positions that went in, ``finished`` when (Unix time), ``worker`` by whom.
    """

    number: int
    object: str
    bytes: int
    crc32: int
    sha256: str
    rows: int
    rejected: tuple[Rejected, ...] = ()
    bytes_by_field: Mapping[str, int] = field(default_factory=dict)
    decoded_bytes_by_field: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    finished: float = 0.0
    worker: str = ""

    def to_json(self) -> str:
        """One line of JSON, with its own checksum."""
        content = dataclasses.asdict(self)
        return _canonical({**content, "record_sha256": _checksum(content)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CommitRecord:
        """The record of ``to_json``; CorruptRecordError where a single character differs."""
        try:
            content = json.loads(text)
            if content.pop("record_sha256") != _checksum(content):
                raise CorruptRecordError("its checksum does not match")
            rejected = tuple(Rejected(**entry) for entry in content.pop("rejected"))
            record = cls(**content, rejected=rejected)
            record._check()
            if record.to_json() != text:
                raise CorruptRecordError("it is not what it was written as")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CorruptRecordError(f"damaged commit record: {error}") from error
        return record

    def _check(self) -> None:
        # The checksum tells damage, not malice: a name such as ../../x would have the reader open it.
        if shard_number(self.object) != self.number:
            raise CorruptRecordError(f"shard {self.number} cannot be the object {self.object!r}")
        if not all(is_key(sample.key) for sample in self.rejected):
            raise CorruptRecordError("a rejected sample has no key")


def object_name(number: int, data: bytes, suffix: str) -> str:
    """Name of a shard object relative to the cache."""
    return f"{SHARDS}/{number:06d}-{hashlib.sha256(data).hexdigest()[:12]}{suffix}"


def shard_number(name: str) -> int | None:
    """Number of the shard that an object is, from its name; None where the name is not one of ours."""
    match = _OBJECT.fullmatch(name)
    return int(match[1]) if match else None


def name_hash(name: str) -> str | None:
    """What an object's name says of its bytes: the first 12 characters of their sha256."""
    match = _OBJECT.fullmatch(name)
    return match[2] if match else None


def record_name(number: int) -> str:
    """Where the record of a shard is, or would be, relative to the cache."""
    return f"{COMMITS}/{number:06d}.json"


def commit(storage: Storage, record: CommitRecord, data: bytes) -> bool:
    """Write a shard's bytes, then its record; False where another worker's record was there first.

    A crash at any point leaves either both, or nothing that exists.
    """
    assert (record.bytes, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    fresh = put(storage, record.object, data)
    first = storage.write(record_name(record.number), record.to_json().encode())
    if first and not fresh:
        # What lay there may have been old enough for another worker to sweep it until a moment ago.
        put(storage, record.object, data)
    if fresh and not first and read_record(storage, record.number).object != record.object:
        storage.delete(record.object)
    return first


def put(storage: Storage, name: str, data: bytes) -> bool:
    """Have an object of these bytes, whose hash its name holds; False where it was there."""
    if storage.write(name, data):
        return True
    with contextlib.suppress(FileNotFoundError):
        if storage.read(name) == data:
            return False
    # Only damage can leave other bytes.
    storage.delete(name)
    storage.write(name, data)
    return True


def committed_numbers(storage: Storage) -> list[int]:
    """Numbers of the shards that have a record, ascending; no record is opened."""
    return sorted(int(match[1]) for name in storage.names(COMMITS) if (match := _RECORD.fullmatch(name)))


def read_record(storage: Storage, number: int) -> CommitRecord:
    """The record of a committed shard; CorruptRecordError that says what to do where it is damaged."""
    return _parse(storage, number, storage.read(record_name(number)))


def read_records(storage: Storage, numbers: Sequence[int] | None = None) -> dict[int, CommitRecord]:
    """Records of all committed shards, by number; CorruptRecordError at the first that is damaged."""
    numbers = committed_numbers(storage) if numbers is None else numbers
    texts = read_all(storage, [record_name(number) for number in numbers])
    return {number: _parse(storage, number, data) for number, data in zip(numbers, texts, strict=True)}


def stray_names(storage: Storage) -> list[str]:
    """Temporaries, and shard objects that no record names: left over, or about to be committed by another worker.

    The only object of a committed shard is the one its record names, so that few records are opened, if any.
    CorruptRecordError where one of these is damaged: what it names would look like a stray.
    """
    numbers = {name: number for name in object_names(storage) if (number := shard_number(name)) is not None}
    objects = Counter(numbers.values())
    # Records are listed after the objects, so that a commit in between is seen.
    committed = set(committed_numbers(storage))
    doubtful = [name for name, number in numbers.items() if number not in committed or objects[number] > 1]
    return [*temporary_names(storage), *(name for name in doubtful if not _recorded(storage, name))]


def sweep(storage: Storage, *, min_age_s: float) -> list[str]:
    """Remove strays; returns their names relative to the cache.

    With other workers writing at the same time, ``min_age_s`` (seconds since the last change) has to be longer than
    a commit takes, or their work in flight is swept as well.
    """
    swept = []
    for name in stray_names(storage):
        if (not min_age_s or storage.age_s(name) >= min_age_s) and not _recorded(storage, name):
            storage.delete(name)
            swept.append(name)
    return swept


def _recorded(storage: Storage, name: str) -> bool:
    """Whether a record names this object by now: a resumed worker finds and uses what a crash left behind."""
    number = shard_number(name)
    return number is not None and storage.size(record_name(number)) is not None and read_record(storage, number).object == name


def temporary_names(storage: Storage) -> list[str]:
    """Files that a crash left half-written, relative to the cache."""

    def found() -> Iterator[str]:
        for folder in ("", "plan", "runs", "tensors", SHARDS, COMMITS):
            prefix = f"{folder}/" if folder else ""
            yield from (prefix + name for name in storage.names(folder) if name.startswith(TEMPORARY))

    return list(found())


def object_names(storage: Storage) -> list[str]:
    """Everything in the folder of shards but temporaries, relative to the cache."""
    return [f"{SHARDS}/{name}" for name in storage.names(SHARDS) if not name.startswith(TEMPORARY)]


def foreign_names(storage: Storage) -> list[str]:
    """What lies among shards and records without being either, relative to the cache."""
    records = [name for name in storage.names(COMMITS) if not name.startswith(TEMPORARY)]
    return [name for name in object_names(storage) if shard_number(name) is None] + [
        f"{COMMITS}/{name}" for name in records if not _RECORD.fullmatch(name)
    ]


def _parse(storage: Storage, number: int, data: bytes) -> CommitRecord:
    try:
        record = CommitRecord.from_json(data.decode())
        if record.number != number:
            raise CorruptRecordError(f"it is the record of shard {record.number}")
    except (CorruptRecordError, UnicodeDecodeError) as error:
        raise CorruptRecordError(
            f"{storage.url}/{record_name(number)}: {error}. Run alignkd cache repair, then cache-teacher again."
        ) from error
    return record


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))

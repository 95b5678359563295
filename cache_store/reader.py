"""A cache being read: rows by key. Nothing is believed before its checksum was compared."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignkd.cache_store.commit import CommitRecord, read_records
from alignkd.cache_store.formats import format_of
from alignkd.cache_store.plan import Plan
from alignkd.cache_store.row import Rejected, Row, is_key
from alignkd.cache_store.shard import CorruptShard, Shard
from alignkd.cache_store.spec import CacheSpec
from alignkd.cache_store.store import read_spec


class MissingRow(KeyError):  # noqa: N818 - a name says what is the matter
    """A key that has no row; the message says why."""

    def __str__(self) -> str:
        # KeyError would show the message in quotes, its line breaks escaped.
        return str(self.args[0])


class CacheReader:
    """Rows of the shards that were committed when the reader was made.

    Opening it reads ``cache.json`` and the commit records, no shard. The ``max_shards`` shards used last stay in
    memory. It holds no open file: it may be pickled (without its shards) and forked. ``verify=False`` leaves out the
    checksum of each shard, not the comparison with spec and record.

    ValueError where there is no cache, CorruptRecord where a commit record is damaged.
    """

    def __init__(self, path: str | Path, *, max_shards: int = 8, verify: bool = True) -> None:
        if max_shards < 1:
            raise ValueError(f"shards to keep in memory: found {max_shards}, expected at least 1")
        self.path = Path(path)
        self.spec: CacheSpec = read_spec(self.path)
        self.max_shards = max_shards
        self.verify = verify
        self.rejected: dict[str, Rejected] = {}
        self._records = read_records(self.path)
        self._at: dict[str, tuple[int, int]] = {}
        for number, record in self._records.items():
            self._at.update((key, (number, i)) for i, key in enumerate(record.keys))
            self.rejected.update((sample.key, sample) for sample in record.rejected)
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": OrderedDict()}

    def __len__(self) -> int:
        return len(self._at)

    def __contains__(self, key: object) -> bool:
        return key in self._at

    def __iter__(self) -> Iterator[str]:
        """Keys in the order of the plan."""
        return iter(self._at)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the targets were made from."""
        return dict(self.spec.fingerprint)

    def shard_of(self, key: str) -> int:
        """Number of the shard that holds ``key``; MissingRow where none does."""
        return self._find(key)[0]

    def row(self, key: str) -> Row:
        """The targets of one sample, decoded; MissingRow where it has none, CorruptShard where its shard is damaged."""
        number, i = self._find(key)
        return self.shard(number).row(i)

    def shard(self, number: int) -> Shard:
        """A committed shard, from memory or from disk; CorruptShard where it is damaged."""
        if number not in self._shards:
            # Room is made first, so that never more than max_shards are in memory.
            while len(self._shards) >= self.max_shards:
                self._shards.popitem(last=False)
            self._shards[number] = open_shard(self.path, self.spec, self._records[number], verify=self.verify)
        self._shards.move_to_end(number)
        return self._shards[number]

    def find(self, sample_id: str) -> list[str]:
        """Keys of the rows and rejected samples with this id, of which there may be several. Reads every shard."""
        rejected = [key for key, sample in self.rejected.items() if sample.sample_id == sample_id]
        rows = [row.key for number in self._records for row in self.shard(number).ids if row.sample_id == sample_id]
        return rows + rejected

    def _find(self, key: str) -> tuple[int, int]:
        if key not in self._at:
            raise MissingRow(f"no row {key!r} in the cache at {self.path}: {self._why_missing(key)}")
        return self._at[key]

    def _why_missing(self, key: str) -> str:
        if key in self.rejected:
            sample = self.rejected[key]
            return f"sample {sample.sample_id!r} was rejected when the cache was written: {sample.reason}"
        planned = Plan.load(self.path).shard_of(key) if is_key(key) else None
        if planned is not None:
            return f"it is planned for shard {planned}, which was not committed yet; run alignkd cache-teacher again"
        return (
            "it was never planned. A key is made of the sample's id, image references and conversation: "
            "has one of them changed since, or is this another data file than the cache was written from?"
        )


def open_shard(root: Path, spec: CacheSpec, record: CommitRecord, *, verify: bool = True) -> Shard:
    """Read a committed shard and compare it with its record; CorruptShard that says what is lost and what to do."""
    try:
        data = (root / record.object).read_bytes()
        _check_bytes(data, record, verify)
        shard = format_of(record.object).read_shard(spec, data)
        if shard.keys != record.keys:
            raise CorruptShard("its keys are not those of its record")
    except (OSError, ValueError) as error:
        some = ", ".join(record.keys[:3]) + (", ..." if record.rows > 3 else "")
        raise CorruptShard(
            f"shard {record.number} of the cache at {root} cannot be used: {record.object}: {error}. "
            f"It holds {record.rows} samples ({some}). Run alignkd cache verify to see all damage."
        ) from error
    return shard


def _check_bytes(data: bytes, record: CommitRecord, verify: bool) -> None:
    if len(data) != record.bytes:
        raise CorruptShard(f"found {len(data)} bytes, expected {record.bytes}")
    if verify and (found := hashlib.sha256(data).hexdigest()) != record.sha256:
        raise CorruptShard(f"found sha256 {found[:12]}..., expected {record.sha256[:12]}...")

"""How much of a cache is done: what its commit records add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.rows.row import Rejected


@dataclass(frozen=True)
class Status:
    """How much of a cache is done. ``records`` are the commit records by number: who finished which shard, and when.

    ``missing``: committed shards whose object is gone; ``alignkd cache repair`` removes their records, and the next
    ``cache-teacher`` makes them again.

    Bytes are those on disk; ``decoded_bytes_by_field`` are those of the decoded values in memory. A value that several
    rows share counts once. ``tensor_bytes`` are those of the tensors stored once per cache.
    """

    shards: int
    samples: int
    records: Mapping[int, CommitRecord]
    tensor_bytes: int = 0
    missing: tuple[int, ...] = ()

    @property
    def shards_done(self) -> int:
        """Committed shards, those that are missing left out."""
        return len(self.records) - len(self.missing)

    @property
    def complete(self) -> bool:
        """Whether every planned shard is committed."""
        return self.shards_done == self.shards

    @property
    def samples_done(self) -> int:
        """Rows of all committed shards, those that are missing left out."""
        return sum(record.rows for number, record in self.records.items() if number not in self.missing)

    @property
    def rejected(self) -> tuple[Rejected, ...]:
        """Rejected samples of all committed shards."""
        return tuple(sample for record in self.records.values() for sample in record.rejected)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards and tensors."""
        return sum(record.bytes for record in self.records.values()) + self.tensor_bytes

    @property
    def bytes_by_field(self) -> dict[str, int]:
        """Bytes of each field on disk."""
        return _add(record.bytes_by_field for record in self.records.values())

    @property
    def decoded_bytes_by_field(self) -> dict[str, int]:
        """Bytes of each field's decoded values."""
        return _add(record.decoded_bytes_by_field for record in self.records.values())

    @property
    def seconds(self) -> float:
        """Time to make all rows, summed over workers."""
        return sum(record.seconds for record in self.records.values())

    @property
    def tokens(self) -> int:
        """Positions that went through the teacher."""
        return sum(record.tokens for record in self.records.values())


def _add(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)

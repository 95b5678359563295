"""One commit record: what it says about a shard, and its JSON."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from alignkd.cache_store.errors import CorruptRecordError
from alignkd.cache_store.limits import load_json
from alignkd.cache_store.protocol.names import name_hash, shard_number
from alignkd.cache_store.rows.row import Rejected, is_key
from alignkd.errors import wrap_errors

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CommitRecord:
    """One committed shard.

    ``object`` is the name of the shard's object in the cache; ``bytes``, ``crc32`` (fast: compared whenever the shard is
    opened) and ``sha256`` (compared by an audit) are those of the whole object. The ``rows`` are the shard's planned
    samples without the ``rejected`` ones, in the order of the plan. For each field: its bytes in the object, and the bytes
    of its decoded values. ``seconds`` is the time to make the rows, ``tokens`` the number of positions that went through the
    teacher, ``finished`` the Unix time of the commit, ``worker`` who made it.
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
        """The record in the text of :meth:`to_json`.

        Raises:
            CorruptRecordError: it is not a record, or a single character differs from what was written.
        """
        with wrap_errors(CorruptRecordError, "damaged commit record"):
            content = load_json(text.encode())
            if content.pop("record_sha256") != _checksum(content):
                raise CorruptRecordError("damaged commit record: its checksum does not match")
            rejected = tuple(Rejected(**entry) for entry in content.pop("rejected"))
            record = cls(**content, rejected=rejected)
            record._check()
            if record.to_json() != text:
                raise CorruptRecordError("damaged commit record: it differs from what alignkd writes")
            return record

    def _check(self) -> None:
        # The checksum detects damage, not malice: with a name such as ../../x the reader would open that file.
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise CorruptRecordError(f"damaged commit record: found sha256 {str(self.sha256)[:80]!r}, expected 64 hex digits")
        if (shard_number(self.object), name_hash(self.object)) != (self.number, self.sha256[:12]):
            raise CorruptRecordError(f"damaged commit record: shard {self.number} cannot be the object {self.object!r}")
        numbers = [self.number, self.bytes, self.crc32, self.rows, self.tokens, *_values(self)]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise CorruptRecordError(f"damaged commit record: expected counts, found {numbers}")
        texts = [self.worker, *(text for s in self.rejected for text in (s.sample_id, s.reason))]
        times = [self.seconds, self.finished]
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_time, times)):
            raise CorruptRecordError(f"damaged commit record: expected texts and times, found {[*texts, *times]}")
        if not all(is_key(sample.key) for sample in self.rejected):
            raise CorruptRecordError("damaged commit record: a rejected sample has no key")


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _values(record: CommitRecord) -> list[int]:
    return [*record.bytes_by_field.values(), *record.decoded_bytes_by_field.values()]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))

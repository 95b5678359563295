"""Where the samples of tar shards lie: columns of integers, which a cache's plan keeps."""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignkd.pipeline.data.readers.archives.groups import Group

COLUMNS = ("shards", "starts", "lengths", "spans", "span_lengths", "members")
MOST_DIGESTS = 4
"""Of a sample whose images are known by their bytes, so many digests are kept; one with more is hashed when it is read."""
_DIGEST = "digest_{}_{}"
_WORDS = 4


class Place(NamedTuple):
    """``shard``: which; ``start``, ``length``: of the text, 0 and 0 where the sample has a fault; ``span``: of all members;
    ``members``: images among them; ``digests``: what those are known by, where the text does not name them."""

    shard: int
    start: int
    length: int
    span: tuple[int, int]
    members: int
    digests: tuple[str, ...]


class TarPlaces:
    """Collects places, one after the other."""

    def __init__(self) -> None:
        self._rows = array("q")
        self._digests, self._digested = bytearray(), array("q")

    def add(self, shard: int, group: Group, sound: bool, digests: Sequence[str]) -> None:
        """The place of one sample; ``sound``: it has no fault."""
        text = group.text if sound else None
        start, length = (text.start, text.size) if text else (0, 0)
        self._rows.extend((shard, start, length, *group.span, len(group.images)))
        kept = digests if len(digests) <= MOST_DIGESTS else ()
        if kept:
            self._digests += bytes.fromhex("".join(kept))
        self._digested.append(len(kept))

    def arrays(self) -> dict[str, np.ndarray]:
        """Int64 ``[N]`` by name. Four words a digest; zeros where there is none."""
        rows = np.asarray(self._rows).reshape(-1, len(COLUMNS))
        found = {name: rows[:, column].copy() for column, name in enumerate(COLUMNS)}
        counts = np.asarray(self._digested)
        digests = np.frombuffer(bytes(self._digests), "<i8").reshape(-1, _WORDS)
        first = np.cumsum(counts) - counts
        for number in range(int(counts.max(initial=0))):
            has = counts > number
            for word in range(_WORDS):
                found[_DIGEST.format(number, word)] = column = np.zeros(len(counts), np.int64)
                column[has] = digests[first[has] + number, word]
        return found


def place_at(columns: Mapping[str, np.ndarray], index: int) -> Place:
    """The place of one sample."""
    shard, start, length, span, span_length, members = (int(columns[name][index]) for name in COLUMNS)
    digests = []
    for number in range(min(members, MOST_DIGESTS)):
        words = [columns[name][index] for word in range(_WORDS) if (name := _DIGEST.format(number, word)) in columns]
        if any(words):
            digests.append(np.array(words, "<i8").tobytes().hex())
    return Place(shard, start, length, (span, span_length), members, tuple(digests))

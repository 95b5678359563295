"""The shards of a reader in memory: fetched ahead by threads; the most recently used ones stay."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from alignkd.cache_store.rows.shard import Shard

THREADS = 2


class ShardCache:
    """At most ``max_shards`` shards in memory, those being fetched included; ``fetch`` reads one by its number.

    It may be pickled (without its shards) and forked.
    """

    def __init__(self, fetch: Callable[[int], Shard], max_shards: int) -> None:
        self.fetch, self.max_shards = fetch, max_shards
        self._clear()

    def _clear(self) -> None:
        self._shards: OrderedDict[int, Future[Shard]] = OrderedDict()
        self._rows: dict[int, dict[str, int]] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"fetch": self.fetch, "max_shards": self.max_shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear()

    def prefetch(self, numbers: Iterable[int]) -> None:
        """Begin to fetch shards that will be needed soon, as many as there is room for."""
        for number in list(dict.fromkeys(numbers))[: self.max_shards]:
            self._future(number)

    def get(self, number: int) -> Shard:
        """A shard, from memory or fetched. Raises what ``fetch`` raises, and then fetches it again at the next call."""
        future = self._future(number)
        try:
            shard = future.result()
        except BaseException:
            self._shards.pop(number, None)
            raise
        if number not in self._rows:
            self._rows[number] = {key: i for i, key in enumerate(shard.keys)}
        return shard

    def row_of(self, number: int, key: str) -> tuple[Shard, int]:
        """A shard, and which of its rows has ``key``."""
        shard = self.get(number)
        return shard, self._rows[number][key]

    def holder(self, key: str) -> int | None:
        """The shard in memory that has a row of this key; None if it is in none of them."""
        for number, rows in self._rows.items():
            if key in rows:
                return number
        return None

    def _future(self, number: int) -> Future[Shard]:
        if self._process != os.getpid():
            # The fetching threads did not survive the fork.
            self._clear()
        if number not in self._shards:
            self._make_room()
            self._pool = self._pool or ThreadPoolExecutor(THREADS, thread_name_prefix="cache-reader")
            self._shards[number] = self._pool.submit(self.fetch, number)
        self._shards.move_to_end(number)
        return self._shards[number]

    def _make_room(self) -> None:
        """Drop shards before the next one is fetched, so that there are never more than ``max_shards``."""
        while len(self._shards) >= self.max_shards:
            dropped, future = self._shards.popitem(last=False)
            self._rows.pop(dropped, None)
            if not future.cancel():
                wait([future])  # one that is being fetched will be in memory, too

"""Kills all workers of stage one at random instants, starts others, and compares what they leave with an undisturbed run."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tiny_runs import IMAGES, TEACHER
from warm_door import Running, WarmDoor

from alignkd.cache_store.errors import CorruptRecordError, CorruptShardError
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.store import open_store

_START = 0.5
"""Share of an undisturbed run's time before the first shard."""


@dataclass(frozen=True)
class Crashes:
    """Kill the workers of the first, second ... number; the last number goes on to the end.

    ``instants`` are shares of the ``seconds`` that the shards still to do take, about, undisturbed.
    """

    shard_format: str
    steal: bool
    workers: list[int]
    instants: list[float]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a cache holds at the end, and how many of its shards were committed at each kill."""

    content_sha256: str
    missing: int
    duplicated: int
    problems: list[str]
    strays: int
    committed_at_kills: list[int]
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether every planned sample is there once, and nothing is wrong."""
        return not (self.missing or self.duplicated or self.problems)


def start_workers(door: WarmDoor, data: Path, cache: str, count: int, shard_format: str, *, steal: bool) -> list[Running]:
    """``count`` real ``alignkd cache-teacher`` processes on one cache."""
    given = {"--teacher": TEACHER, "--data": data, "--images": IMAGES, "--cache": cache, "--format": shard_format}
    given |= {"--shard-samples": 2, "--device": "cpu", "--host-threads": 1, "--world-size": count}
    words = [word for pair in given.items() for word in pair] + ["--steal"] * steal
    return [door.start("cache-teacher", *words, "--rank", rank) for rank in range(count)]


def finish(workers: list[Running], *expected: int) -> list[str]:
    """Wait for workers; what those said that ended with another exit code than 0 or those ``expected``."""
    ended = [worker.finish() for worker in workers]
    return [f"exit code {end.code}: {end.stderr[-2000:]}" for end in ended if end.code not in (0, *expected)]


def kill_after(workers: list[Running], seconds: float) -> list[str]:
    """``kill -9`` for all of them at once; whoever is done by then has been spared."""
    time.sleep(seconds)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    return finish(workers, -signal.SIGKILL)


def crash_run(door: WarmDoor, data: Path, cache: str, crashes: Crashes) -> Outcome:
    """Write a cache in spite of these crashes, and audit it."""
    started = time.perf_counter()
    at_kills: list[int] = []
    failures: list[str] = []
    left = 1.0
    for count, instant in zip(crashes.workers, crashes.instants, strict=False):
        workers = start_workers(door, data, cache, count, crashes.shard_format, steal=crashes.steal)
        failures += kill_after(workers, instant * crashes.seconds * (_START + (1 - _START) * left))
        done, left = progress(cache)
        at_kills.append(done)
    failures += finish(start_workers(door, data, cache, crashes.workers[-1], crashes.shard_format, steal=crashes.steal))
    return look_at(cache, failures, at_kills, time.perf_counter() - started)


def progress(cache: str) -> tuple[int, float]:
    """Committed shards, and the share that is left; there may be no cache yet."""
    try:
        store = open_store(cache)
    except ValueError:
        return 0, 1.0
    left = len(store.pending())
    return store.plan.shards - left, left / store.plan.shards


def look_at(cache: str, failures: list[str], at_kills: list[int], seconds: float) -> Outcome:
    """Audit a cache, and count the rows that its shards really hold."""
    report = verify(cache)
    plan = open_store(cache).plan
    found: Counter[str] = Counter()
    with suppress(CorruptRecordError):
        reader = CacheReader(cache)
        found.update(list(reader.rejected))
        for number in reader.records:
            with suppress(CorruptShardError):
                found.update(reader.shard(number).keys)
    return Outcome(
        content_sha256=report.content_sha256,
        missing=sum(key not in found for number in range(plan.shards) for key in plan.keys_of(number)),
        duplicated=sum(count - 1 for count in found.values()),
        problems=[*failures, *map(str, report.problems)],
        strays=len(report.strays),
        committed_at_kills=at_kills,
        seconds=round(seconds, 3),
    )

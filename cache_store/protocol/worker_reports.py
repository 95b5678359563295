"""Which workers are at work on a cache, and with what: one small object a worker, replaced every half minute.

Reports are for people. No shard, record or row depends on them, and a cache without them is whole. A worker writes
``workers/ID-00000000.json``, later ``workers/ID-00000001.json``, and removes the one before: objects are never written over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from alignkd.cache_store.protocol.names import WORKERS
from alignkd.cache_store.storage import Storage

AT_WORK = ("calibrating", "writing")
"""States of a worker that is alive; a killed one leaves the state that it was in, and is known by its silence."""

STATES = (*AT_WORK, "done", "stopped", "failed")

_NAME = re.compile(r"([0-9a-f]{16})-(\d{8})\.json")
_LARGEST = 10_000
"""Bytes; a report has about 200."""


@dataclass(frozen=True)
class WorkerReport:
    """One worker's own words: ``worker`` its rank and the number of workers (``0/8``), when it started (Unix time), its
    ``state``, and the ``samples`` that it has written since.
    """

    worker: str
    host: str
    pid: int
    started: float
    state: str
    samples: int = 0

    def __post_init__(self) -> None:
        texts, numbers = [self.worker, self.host], [self.pid, self.samples]
        if not all(isinstance(text, str) for text in texts) or self.state not in STATES:
            raise ValueError("not a worker's report")
        if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(self.started, float):
            raise ValueError("not a worker's report")


@dataclass
class Reporter:
    """Writes one worker's reports."""

    storage: Storage
    report: WorkerReport
    _written: int = field(default=0, init=False)

    def write(self, state: str, samples: int) -> None:
        """Replace this worker's report."""
        self.report = dataclasses.replace(self.report, state=state, samples=samples)
        self.storage.write(self._name(self._written), json.dumps(dataclasses.asdict(self.report)).encode())
        if self._written:
            self.storage.delete(self._name(self._written - 1))
        self._written += 1

    def _name(self, number: int) -> str:
        who = f"{self.report.worker} {self.report.host} {self.report.pid} {self.report.started}"
        return f"{WORKERS}/{hashlib.sha256(who.encode()).hexdigest()[:16]}-{number:08d}.json"


@dataclass(frozen=True)
class Heard:
    """A worker's last report, and how many seconds ago the storage received it."""

    report: WorkerReport
    age_s: float


def read_reports(storage: Storage) -> list[Heard]:
    """The last report of each worker, oldest worker first. What is no report, or is damaged, is left out."""
    heard = []
    for name in _last_names(storage).values():
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, RecursionError):
            if (storage.size(name) or 0) <= _LARGEST:
                heard.append(Heard(WorkerReport(**json.loads(storage.read(name))), storage.age_s(name)))
    return sorted(heard, key=lambda one: (one.report.started, one.report.worker))


def sweep_reports(storage: Storage, *, min_age_s: float) -> None:
    """Remove reports that are older than ``min_age_s``: of workers that ended, or were killed, long ago."""
    for name in storage.names(WORKERS):
        if _NAME.fullmatch(name) and storage.age_s(f"{WORKERS}/{name}") >= min_age_s:
            storage.delete(f"{WORKERS}/{name}")


def new_reporter(storage: Storage, worker: str, host: str, pid: int, clock: Callable[[], float] = time.time) -> Reporter:
    """The reporter of a worker that starts now."""
    return Reporter(storage, WorkerReport(worker, host, pid, float(clock()), STATES[0]))


def _last_names(storage: Storage) -> dict[str, str]:
    found = [match for name in storage.names(WORKERS) if (match := _NAME.fullmatch(name))]
    return {match[1]: f"{WORKERS}/{match[0]}" for match in sorted(found, key=lambda match: match[2])}

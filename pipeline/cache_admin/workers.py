"""The workers of a cache: who is at work, who has gone, and what each has committed."""

import os
import platform
from collections.abc import Sequence
from typing import Any

from alignkd.cache_store.protocol.record import CommitRecord
from alignkd.cache_store.protocol.worker_reports import AT_WORK, Heard, WorkerReport

SILENT_S = 120.0
"""A worker at work that has not reported for this many seconds is taken for gone: it reports every half minute."""

MISSED_S = 45.0
"""After a report that is missed, a worker of this host is taken for gone where its process is: not before, since a container
may share the host's name and count its processes by itself."""


def worker_figures(
    records: Sequence[CommitRecord], heard: Sequence[Heard], *, now: float, recent_s: float
) -> list[dict[str, Any]]:
    """One entry a worker, those heard of last first.

    ``seconds_since_commit`` and ``samples_per_second`` (over its commits of the last ``recent_s`` seconds) are None where
    there is none. ``state`` is "calibrating", "writing", "done", "stopped", "failed", "gone" (silent in the middle of its
    work) or "unknown" (it committed shards, and left no report).
    """
    committed: dict[tuple[str, str, int], list[CommitRecord]] = {}
    for record in records:
        committed.setdefault(_who(record.worker), []).append(record)
    reports = {(one.report.worker, one.report.host, one.report.pid): one for one in heard}
    found = []
    for who in {**reports, **committed}:
        mine, report = sorted(committed.get(who, []), key=lambda record: record.finished), reports.get(who)
        last = mine[-1].finished if mine else None
        found.append(
            {
                "worker": who[0],
                "host": who[1],
                "pid": who[2],
                "state": _state(report),
                "seconds_since_commit": None if last is None else round(max(now - last, 0.0), 1),
                "samples": sum(record.rows for record in mine),
                "samples_per_second": _rate([record for record in mine if now - record.finished <= recent_s]),
            }
        )
    return sorted(
        found, key=lambda one: (one["state"] not in AT_WORK, _unknown_last(one["seconds_since_commit"]), one["worker"])
    )


def _who(worker: str) -> tuple[str, str, int]:
    """Rank, host and process of a record's worker, ``0/8 host 4711``."""
    rank, host, pid = [*worker.split(" "), "", "", ""][:3]
    return rank, host, int(pid) if pid.isdecimal() else 0


def _state(heard: Heard | None) -> str:
    if heard is None:
        return "unknown"
    gone = heard.age_s > SILENT_S or (heard.age_s > MISSED_S and _has_ended(heard.report))
    return "gone" if heard.report.state in AT_WORK and gone else heard.report.state


def _has_ended(report: WorkerReport) -> bool:
    """Whether a worker of this host has no process any more; of other hosts nothing is known."""
    if report.host != platform.node() or not report.pid:
        return False
    try:
        os.kill(report.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's process; no process has such a number
        return False
    return False


def _rate(records: Sequence[CommitRecord]) -> float | None:
    """Samples a second of a worker that makes one shard after the other."""
    seconds = sum(record.seconds for record in records)
    return round(sum(record.rows for record in records) / seconds, 3) if seconds else None


def _unknown_last(seconds: float | None) -> float:
    return float("inf") if seconds is None else seconds

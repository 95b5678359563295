"""A worker of stage one says every half minute that it is alive, and what it is doing; ``alignkd cache status`` shows it."""

import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from alignkd.cache_store.errors import StorageError
from alignkd.cache_store.protocol.worker_reports import AT_WORK, Reporter, new_reporter, sweep_reports
from alignkd.cache_store.storage import open_storage
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.runtime.signals import Interrupted

BEAT_S = 30.0
OLD_S = 86_400.0
"""Seconds; reports of workers that were last heard of before are removed by the next worker that starts."""

_log = logging.getLogger(__name__)


class Heartbeat:
    """What a worker is doing. A thread of its own reports it, so that a forward pass of minutes is no silence.

    Nothing is written before the first :meth:`enter`: a command that is refused leaves no trace in the cache.
    """

    def __init__(self, cache: str, worker: Worker, beat_s: float = BEAT_S) -> None:
        self._cache, self._worker, self._beat_s = cache, worker, beat_s
        self._reporter: Reporter | None = None
        self._state = AT_WORK[0]
        self._samples: Callable[[], int] = lambda: 0
        self._ended, self._lock, self._failed = threading.Event(), threading.Lock(), False
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def enter(self, state: str, samples: Callable[[], int] | None = None) -> None:
        """Report a state at once, then every ``beat_s`` seconds; ``samples`` counts those written."""
        self._state, self._samples = state, samples or self._samples
        if self._reporter is None:
            storage = open_storage(self._cache)
            self._reporter = new_reporter(storage, str(self._worker), platform.node(), os.getpid())
            self._thread.start()
        self._report(self._reporter)

    def end(self, state: str) -> None:
        """Report the last state, and stop."""
        if self._reporter is not None:
            self._ended.set()
            self._thread.join()
            self.enter(state)

    def _beat(self) -> None:
        assert self._reporter is not None
        sweep_reports(self._reporter.storage, min_age_s=OLD_S)
        while not self._ended.wait(self._beat_s):
            self._report(self._reporter)

    def _report(self, reporter: Reporter) -> None:
        try:
            with self._lock:
                reporter.write(self._state, self._samples())
        except (StorageError, FileNotFoundError) as error:
            # The work goes on: where the storage fails, writing a shard will say so.
            _log.log(logging.DEBUG if self._failed else logging.WARNING, "this worker's state cannot be reported: %s", error)
            self._failed = True


@contextmanager
def heartbeat(cache: str, worker: Worker) -> Iterator[Heartbeat]:
    """Report a worker's states until its work ends, in whatever way."""
    beat = Heartbeat(cache, worker)
    try:
        yield beat
    except Interrupted:
        beat.end("stopped")
        raise
    except BaseException:
        beat.end("failed")
        raise
    beat.end("done")

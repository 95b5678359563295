"""Host work beside the forward pass: inputs prepared ahead of it, outputs written behind it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

_BEHIND = 4
"""Writes that may wait: their batches are held in memory."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class HostThreads:
    """A few threads that read ahead, and one that writes behind.

    Decoding images, packing, compressing and hashing release the interpreter's lock, so threads are enough and nothing
    has to be sent between processes.
    """

    def __init__(self, readers: int) -> None:
        self._readers = ThreadPoolExecutor(max(readers, 1), thread_name_prefix="prepare")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: deque[Future[Any]] = deque()

    def prefetch(self, items: Iterable[_Item], prepare: Callable[[_Item], _Result], count: int) -> Iterator[_Result]:
        """``prepare`` of each item, in order, up to ``count`` of them begun before they are asked for."""
        waiting: deque[Future[_Result]] = deque()
        for item in items:
            waiting.append(self._readers.submit(prepare, item))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def write_behind(self, write: Callable[[], Any]) -> None:
        """Do ``write`` in the background, in the order of the calls; waits where too much is waiting.

        The error of an earlier one is raised here.
        """
        self._writing.append(self._writer.submit(write))
        while self._writing and (len(self._writing) > _BEHIND or self._writing[0].done()):
            self._writing.popleft().result()

    def flush(self) -> None:
        """Wait until everything is written."""
        while self._writing:
            self._writing.popleft().result()

    def __enter__(self) -> "HostThreads":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        try:
            # What was begun is finished also when the job ends early: a signal costs the shard in hand and no other.
            self.flush()
        except Exception:
            if kind is None:
                raise
        finally:
            self._writer.shutdown(wait=True, cancel_futures=True)

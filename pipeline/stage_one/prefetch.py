"""Host work in threads beside the forward pass: prepare the next inputs, write the last outputs."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

_MAX_WRITES = 4
"""Writes that may wait. Each keeps its batch in memory."""

_Input = TypeVar("_Input")
_Result = TypeVar("_Result")


class HostThreads:
    """A few threads that prepare inputs, and one that writes outputs.

    Decoding images, compressing and hashing release the interpreter's lock, so threads are enough: nothing has to be sent
    between processes.
    """

    def __init__(self, readers: int) -> None:
        self._readers = ThreadPoolExecutor(max(readers, 1), thread_name_prefix="prepare")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._writing: deque[Future[Any]] = deque()

    def prefetch(self, inputs: Iterable[_Input], prepare: Callable[[_Input], _Result], count: int) -> Iterator[_Result]:
        """``prepare`` of each input, in order; up to ``count`` of them are begun before they are asked for."""
        waiting: deque[Future[_Result]] = deque()
        for one in inputs:
            waiting.append(self._readers.submit(prepare, one))
            if len(waiting) > count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def write_behind(self, write: Callable[[], Any]) -> None:
        """Call ``write`` in the background, in the order of the calls; blocks while too many writes wait.

        Raises the error of an earlier write, if it failed.
        """
        self._writing.append(self._writer.submit(write))
        while self._writing and (len(self._writing) > _MAX_WRITES or self._writing[0].done()):
            self._writing.popleft().result()

    def flush(self) -> None:
        """Wait until everything is written; raises the error of a write that failed."""
        while self._writing:
            self._writing.popleft().result()

    def __enter__(self) -> "HostThreads":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        try:
            # Writes that were begun are finished even if the job ends early: a signal costs only the current shard.
            self.flush()
        except Exception:
            if kind is None:
                raise
        finally:
            self._writer.shutdown(wait=True, cancel_futures=True)

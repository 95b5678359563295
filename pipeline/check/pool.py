"""The same look at many parts, by several processes, with the results in order."""

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from alignkd.errors import TransientError
from alignkd.pipeline.runtime.signals import StopFlag, ignore_stop_signals

_Part = TypeVar("_Part")
_Result = TypeVar("_Result")
_AHEAD = 3
"""Parts for each process that are begun before their results are asked for."""

_looks: list[Callable[[Any], Any]] = []
"""The look of a worker process, set once when it starts: it may hold much, and is not sent with each part."""


def looked(
    look: Callable[[_Part], _Result], parts: Iterable[_Part], workers: int, stop: StopFlag
) -> Iterator[tuple[_Part, _Result]]:
    """Each part with the look at it, in the order of the parts; with one worker, in this process.

    Raises:
        Interrupted: a signal came.
        TransientError: a process ended without a word, most likely for want of memory.
    """
    if workers <= 1:
        for part in parts:
            stop.check()
            yield part, look(part)
        return
    # Forked processes would share the locks of this one's threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(look,))
    waiting: deque[tuple[_Part, Future[_Result]]] = deque()
    try:
        for part in parts:
            waiting.append((part, pool.submit(_call, part)))
            if len(waiting) > workers * _AHEAD:
                yield _next(waiting, stop)
        while waiting:
            yield _next(waiting, stop)
    except BrokenProcessPool as error:
        raise TransientError(
            "a process that reads samples has ended without a word, most likely for want of memory: use fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def workers_for(count: int, wanted: int | None, few: int) -> int:
    """How many processes are worth starting for so many samples or images; ``few`` of them are read sooner by this one."""
    if count <= few:
        return 1
    if wanted is not None:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _next(waiting: "deque[tuple[_Part, Future[_Result]]]", stop: StopFlag) -> tuple[_Part, _Result]:
    stop.check()
    part, future = waiting.popleft()
    return part, future.result()


def _start(look: Callable[[Any], Any]) -> None:
    ignore_stop_signals(0)
    _looks.append(look)


def _call(part: Any) -> Any:
    return _looks[-1](part)

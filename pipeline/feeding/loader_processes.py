"""Loader processes that end when they are no longer wanted, and whose loss or silence is an error, never a wait without end.

Schedulers send their signals to every process of a job. Loaders ignore them, as the training process needs batches until it
has written its checkpoint. So they cannot be ended by SIGTERM, which is what torch and multiprocessing use: they are killed,
and nothing is lost, since loaders only read.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.util import Finalize
from threading import Thread
from typing import Any

from torch.utils.data import Dataset
from torch.utils.data._utils import signal_handling

from alignkd.errors import AlignkdError, TransientError
from alignkd.pipeline.runtime.signals import ignore_stop_signals

LOOK_EVERY_S = 1.0
"""Seconds between looks at whether the loader processes, or their parent, are alive."""


class LoaderFailure:
    """An error of a loader process, to be raised in the training process as what it is.

    torch would make a new error of the same type from the text of the traceback, which loses ``errno``.
    """

    def __init__(self, error: Exception) -> None:
        try:
            self.error = pickle.loads(pickle.dumps(error))
        except Exception:
            self.error = RuntimeError(f"{type(error).__name__} in a loader process: {error}")


class SampleSource(Dataset[Any]):
    """A data set whose errors are handed over as a :class:`LoaderFailure`."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, positions: list[int]) -> Sequence[Any] | LoaderFailure:
        try:
            items: Sequence[Any] = self.data.__getitems__(positions)
        except (AlignkdError, OSError, MemoryError) as error:
            return LoaderFailure(error)
        return items


class Collate:
    """Collates samples; a :class:`LoaderFailure` passes."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[Any] | LoaderFailure) -> Any:
        """A batch, or what failed."""
        return items if isinstance(items, LoaderFailure) else self.collate(items)


def begin_loader(worker: int) -> None:
    """In a loader process: ignore the scheduler's signals, and end when the training process has ended, however it did."""
    ignore_stop_signals(worker)
    Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent, adopted_by = multiprocessing.parent_process(), os.getppid()
    assert parent is not None
    # Loaders started later hold copies of this pipe, so its end alone does not tell; neither does the parent's id, where a
    # server forks the loaders.
    while not wait([parent.sentinel], LOOK_EVERY_S) and os.getppid() == adopted_by:
        pass
    os._exit(1)


def receive_ahead(batches: Any, longest_wait_s: float) -> Generator[Any, None, None]:
    """The same batches; the next one is received while the last one is in use. Closing it ends the loader processes.

    Raises:
        TransientError: a loader process was killed, or none gave a batch within ``longest_wait_s`` seconds.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    arrived: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    # A daemon: a loader that was killed while it wrote leaves a part of a batch, whose rest a thread awaits for ever.
    Thread(target=_receive, args=(batches, wanted, arrived), name="receive", daemon=True).start()
    wanted.put(True)
    try:
        while True:
            batch = _next(batches, arrived, longest_wait_s)
            if batch is None:
                return
            if isinstance(batch, LoaderFailure):
                raise batch.error
            wanted.put(True)
            yield batch
    finally:
        wanted.put(False)
        end_loaders(batches)


def _receive(batches: Iterator[Any], wanted: "queue.SimpleQueue[bool]", arrived: "queue.SimpleQueue[Any]") -> None:
    while wanted.get():
        try:
            arrived.put((next(batches, None), None))
        except BaseException as error:
            arrived.put((None, error))


def _next(batches: Any, arrived: "queue.SimpleQueue[Any]", longest_wait_s: float) -> Any:
    end = time.monotonic() + longest_wait_s
    while True:
        try:
            batch, error = arrived.get(timeout=min(LOOK_EVERY_S, longest_wait_s))
        except queue.Empty:
            _check_alive(batches)
            if time.monotonic() < end:
                continue
            raise TransientError(
                f"the loader processes gave no batch in {longest_wait_s:g} seconds: the storage of the cache or of the images"
                " does not answer, or a loader was stopped. Run the same command again with --resume"
            ) from None
        if error is not None:
            raise lost_loader(error) or error
        return batch


def _check_alive(batches: Any) -> None:
    for process in batches._workers:
        if process.exitcode:
            raise _lost(f"loader process {process.pid} {_how(process.exitcode)}")


def _how(exit_code: int) -> str:
    return f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"


def _lost(what: str) -> TransientError:
    return TransientError(
        f"{what}: often the machine was short of memory. Run the same command again with --resume, and fewer --workers if it"
        " happens again"
    )


def lost_loader(error: BaseException) -> TransientError | None:
    """What to raise in place of torch's error that a loader process has died; it comes up wherever the main thread is."""
    text = str(error)
    if not isinstance(error, RuntimeError) or "DataLoader worker (pid" not in text:
        return None
    return _lost(text.partition("\n")[0].rstrip(". ").replace("DataLoader worker", "loader process"))


def end_at_exit(batches: Any) -> None:
    """End the loader processes before multiprocessing waits for them, where nobody has done so until the program ends."""
    Finalize(batches, _kill, args=(id(batches), batches._workers), exitpriority=10)


def end_loaders(batches: Any) -> None:
    """Kill the loader processes of torch's iterator, and have torch wait for nothing of theirs."""
    batches._shutdown = True
    batches._worker_pids_set = False
    if hasattr(batches, "_pin_memory_thread_done_event"):
        batches._pin_memory_thread_done_event.set()
    _kill(id(batches), batches._workers)


def _kill(iterator: int, processes: Sequence[Any]) -> None:
    with contextlib.suppress(ValueError):  # torch has forgotten them itself
        signal_handling._remove_worker_pids(iterator)  # type: ignore[attr-defined]  # else it raises in the main thread that they have died
    for process in processes:
        process.kill()
    for process in processes:
        process.join(5)
        if process.is_alive():  # it waits for a dead file server, and cannot be killed: let Python not wait for it at exit
            multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]

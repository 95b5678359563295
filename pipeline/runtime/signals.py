"""Stop at the next safe point when the scheduler or the user asks for it, so that the job can be resumed."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = 75
"""The exit code of a job that was stopped and can be resumed; schedulers know it as EX_TEMPFAIL."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 - an early, orderly end; not an error that the user has to act on
    """The job stopped early at a safe point; running it again continues from there."""


class StopFlag:
    """Set by SIGTERM, SIGUSR1, SIGHUP or SIGINT; the second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def check(self) -> None:
        """Call at a safe point.

        Raises:
            Interrupted: a signal came.
        """
        if self.signal_name is not None:
            raise Interrupted(f"stopped by {self.signal_name}; run the same command again to continue")


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catch the signals that a scheduler sends before it kills, for the duration of a job. In a thread: catch nothing."""
    flag = StopFlag()

    def note(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and flag:
            raise KeyboardInterrupt
        flag.signal_name = signal.Signals(number).name

    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def take_back_signals() -> None:
    """Install the handlers of :func:`stop_on_signals` again, after a library has put its own below Python's.

    Ray's core does when it connects. Its handler for SIGTERM aborts the process three seconds later.
    """
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.getsignal(number))


@contextmanager
def resumable_from_the_start() -> Iterator[None]:
    """While a job only loads libraries, which takes seconds: end at once, with the exit code that says "run it again"."""

    def leave(number: int, _frame: FrameType | None) -> None:
        os.write(2, f"stopped by {signal.Signals(number).name}; run the same command again\n".encode())
        # Libraries catch whatever is raised while they are imported. Nothing was written yet.
        os._exit(RESUMABLE)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in _SIGNALS if number != signal.SIGINT]
    previous = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_stop_signals(_worker: int) -> None:
    """Make a loader process ignore the signals that schedulers send to every process of a job.

    The parent needs its loaders until it has written its checkpoint; they end when it does.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

"""Stop at the next safe point when the scheduler or the user asks for it, so that the job can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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


def ignore_stop_signals(_worker: int) -> None:
    """Make a loader process ignore the signals that schedulers send to every process of a job.

    The parent needs its loaders until it has written its checkpoint; they end when it does.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

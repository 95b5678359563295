"""Stop at the next safe point when the scheduler (or the user) asks, so that the job can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE_EXIT_CODE = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Interrupted(Exception):  # noqa: N818 - an early but orderly end
    """The job stopped early at a safe point; running the same command again goes on from there."""


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or SIGINT; the second SIGINT interrupts at once."""

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
            raise Interrupted(f"stopped by {self.signal_name}; run the same command again to go on")


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catch the signals a scheduler sends before it kills, for the duration of a job."""
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


def leave_signals_to_parent(_worker: int) -> None:
    """Make a loader process outlive the signals that schedulers send to every process of a job.

    The parent needs its loaders until it has written its checkpoint; they end when it does.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)

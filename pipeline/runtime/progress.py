"""One progress bar per job on a terminal, with rate and time left; and in the log, a line every 30 seconds."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from alignkd.pipeline.runtime.printable import printable

stderr_console = Console(stderr=True)
"""For people; standard output is for the figures that a command prints."""

LOG_EVERY_S = 30.0
"""Seconds between lines in the log."""

bars_drawn = True
"""Whether bars may be drawn on a terminal: not where its lines are read by a program."""

_log = logging.getLogger(__name__)


class _Rate(ProgressColumn):
    """Finished units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s", style="cyan")


class ProgressBar:
    """A running bar; ``advance`` moves it, ``note`` writes beside it."""

    def __init__(self, progress: Progress, task: Task, show: bool) -> None:
        self._progress, self._task = progress, task
        self._shown = show
        self._started = self._logged = time.monotonic()
        self._before = task.completed

    @property
    def seconds(self) -> float:
        """Since the bar began."""
        return time.monotonic() - self._started

    def advance(self, amount: float = 1) -> None:
        """Count ``amount`` more units as done."""
        self._progress.advance(self._task.id, amount)
        if self._shown and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            self._log_progress()

    def note(self, text: str) -> None:
        """Show a short text after the bar."""
        self._progress.update(self._task.id, note=printable(text))

    def log_end(self) -> None:
        """Log how much was done, and how long it took."""
        if self._shown:
            done, unit = self._task.completed, self._task.fields["unit"]
            self._write(f"{self._task.description}: {done:,.0f} {unit} done in {self.seconds:,.0f} s")

    def _log_progress(self) -> None:
        task = self._task
        rate = (task.completed - self._before) / self.seconds
        left = f"{((task.total or 0) - task.completed) / rate:,.0f} s left" if rate else "time left unknown"
        self._write(
            f"{task.description}: {task.completed:,.0f} of {task.total:,.0f} {task.fields['unit']}, {rate:,.1f}/s, {left}"
        )

    def _write(self, words: str) -> None:
        task = self._task
        note = f"; {task.fields['note']}" if task.fields["note"] else ""
        fields = {"progress": task.description, "done": task.completed, "total": task.total, "unit": task.fields["unit"]}
        _log.info("%s%s", words, note, extra={"progress": True, "fields": fields})


@contextmanager
def progress_bar(title: str, total: float, unit: str, *, done: float = 0, show: bool = True) -> Iterator[ProgressBar]:
    """A progress bar over ``total`` units, ``done`` of them before now. With ``show=False`` it counts, and shows nothing."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    drawn = show and bars_drawn and stderr_console.is_terminal
    with Progress(*columns, console=stderr_console, transient=False, disable=not drawn) as progress:
        number = progress.add_task(printable(title), total=total, completed=done, unit=unit, note="")  # type: ignore[arg-type]
        bar = ProgressBar(progress, next(task for task in progress.tasks if task.id == number), show)
        yield bar
    bar.log_end()

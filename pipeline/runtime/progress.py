"""One bar a stage, with rate and time left, on standard error; plain lines now and then where that is a log file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)

LOG_EVERY_S = 30.0
"""Seconds between lines in a log file, which cannot show a bar that moves."""


class _Rate(ProgressColumn):
    """Finished units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s", style="cyan")


class Bar:
    """A running bar; ``advance`` moves it, ``note`` writes beside it."""

    def __init__(self, progress: Progress, task: Task, show: bool) -> None:
        self._progress, self._task = progress, task
        self._in_log = show and not console.is_terminal
        self._started = self._logged = time.monotonic()
        self._before = task.completed

    @property
    def seconds(self) -> float:
        """Since the bar began."""
        return time.monotonic() - self._started

    def advance(self, amount: float = 1) -> None:
        """Count ``amount`` more units as done."""
        self._progress.advance(self._task.id, amount)
        if self._in_log and time.monotonic() - self._logged >= LOG_EVERY_S:
            self._logged = time.monotonic()
            self._log()

    def note(self, text: str) -> None:
        """Show a few words after the bar."""
        self._progress.update(self._task.id, note=text)

    def _log(self) -> None:
        task = self._task
        rate = (task.completed - self._before) / self.seconds
        left = f"{((task.total or 0) - task.completed) / rate:,.0f} s left" if rate else "time left unknown"
        words = f"{task.description}: {task.completed:,.0f} of {task.total:,.0f} {task.fields['unit']}, {rate:,.1f}/s, {left}"
        console.print(f"{words}{'; ' if task.fields['note'] else ''}{task.fields['note']}", highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str, total: float, unit: str, *, done: float = 0, show: bool = True) -> Iterator[Bar]:
    """A progress bar over ``total`` units, ``done`` of them before now; one that is not shown only counts."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, transient=False, disable=not show) as progress:
        number = progress.add_task(title, total=total, completed=done, unit=unit, note="")  # type: ignore[arg-type]
        yield Bar(progress, next(task for task in progress.tasks if task.id == number), show)

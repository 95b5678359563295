"""One bar a stage, with rate and time left, on standard error."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)


class _Rate(ProgressColumn):
    """Finished units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f} {task.fields['unit']}/s", style="cyan")


class Bar:
    """A running bar; ``advance`` moves it, ``note`` writes beside it."""

    def __init__(self, progress: Progress, task_id: int) -> None:
        self._progress, self._task = progress, task_id

    def advance(self, amount: float = 1) -> None:
        """Count ``amount`` more units as done."""
        self._progress.advance(self._task, amount)  # type: ignore[arg-type]

    def note(self, text: str) -> None:
        """Show a few words after the bar."""
        self._progress.update(self._task, note=text)  # type: ignore[arg-type]


@contextmanager
def bar(title: str, total: float, unit: str, *, done: float = 0) -> Iterator[Bar]:
    """A progress bar over ``total`` units, ``done`` of them before now."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Progress(*columns, console=console, transient=False) as progress:
        task = progress.add_task(title, total=total, completed=done, unit=unit, note="")  # type: ignore[arg-type]
        yield Bar(progress, task)

"""Tables of at most 80 columns, for people."""

from collections.abc import Iterable

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from alignkd.pipeline.runtime.printable import printable

WIDTH = 80


def print_width(content: RenderableType) -> None:
    """Print on standard output in :data:`WIDTH` columns, whatever the terminal."""
    Console(width=WIDTH, highlight=False, markup=False, emoji=False).print(content)


def figures_table(columns: Iterable[str], wide: int | None = None, texts: Iterable[str] = ()) -> Table:
    """Columns of figures, right-aligned after the first; ``wide``: the one that is cut where a line is too long.

    ``texts``: names of columns whose cells are words.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(columns):
        text = number in (0, wide) or name in texts
        table.add_column(
            name, justify="left" if text else "right", no_wrap=number != wide, overflow="fold" if number == wide else "ellipsis"
        )
    return table


def add_row(table: Table, *words: str) -> None:
    """A row of cells, hidden characters shown escaped."""
    table.add_row(*(Text(printable(word)) for word in words))

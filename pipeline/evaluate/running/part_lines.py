"""Lines that the processes of a run append while it is under way: a file for each process, and any number of them is read.

``answers-RANK-of-N.jsonl``, one JSON object a line. A process that is killed leaves at most one line that is torn.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.printable import json_text
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.plain_files import open_plain

AGAIN = "run the same command again"
LARGEST_LINE = 64 * 2**20
_PATTERN = "answers-*-of-*.jsonl"

Append = Callable[[Sequence[Mapping[str, Any]]], None]


class PartLine(NamedTuple):
    """A line that is a JSON object, and where it stands."""

    path: Path
    start: int
    length: int
    value: dict[str, Any]


def part_files(folder: Path) -> list[Path]:
    """The files of all processes of all runs."""
    return sorted(folder.glob(_PATTERN))


def read_part_lines(folder: Path) -> Iterator[PartLine]:
    """Every whole line that is a JSON object, file by file; what cannot be read is left out."""
    for path in part_files(folder):
        start = 0
        with open_plain(path) as file:
            while (line := file.readline(LARGEST_LINE)).endswith(b"\n"):
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    yield PartLine(path, start, len(line), value)
                start += len(line)


@contextmanager
def appending(folder: Path, worker: Worker) -> Iterator[Append]:
    """What appends lines to the file of a process; they are in the file when it returns.

    Raises:
        TransientError, CheckpointError: see :func:`explained_write_faults`.
    """
    path = folder / f"answers-{worker.rank}-of-{worker.world_size}.jsonl"
    with explained_write_faults(folder, path.name, again=AGAIN):
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)

    def append(lines: Sequence[Mapping[str, Any]]) -> None:
        left = memoryview("".join(json_text(line) + "\n" for line in lines).encode())
        with explained_write_faults(folder, path.name, again=AGAIN):
            while left:
                left = left[os.write(file, left) :]

    try:
        with explained_write_faults(folder, path.name, again=AGAIN):
            _cut_torn_line(file)
        yield append
    finally:
        os.close(file)


def _cut_torn_line(file: int) -> None:
    """Remove what follows the last line break, so that the next line is whole."""
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - 65_536)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)

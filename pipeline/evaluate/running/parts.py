"""Answers on disk while a run is under way: each process appends to a file of its own, and any number of them is read.

``parts/answers-RANK-of-N.jsonl``, one JSON object a line: ``index`` of the question, its ``question_id``, ``text``, and
``seconds``. A process that is killed leaves at most one line that is torn; whatever cannot be read is answered again.
"""

import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkd.pipeline.evaluate.benchmarks.contract import Question
from alignkd.pipeline.evaluate.running.answering import Answered
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.printable import json_text
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.plain_files import read_plain

AGAIN = "run the same command again"
_LARGEST_PART = 4 * 2**30


class Parts:
    """The part files of one benchmark, in ``folder``."""

    def __init__(self, folder: Path, questions: Sequence[Question]) -> None:
        self.folder, self.questions = folder, questions

    def read(self) -> dict[int, Answered]:
        """What all processes of all runs have answered, by question."""
        found = dict[int, Answered]()
        for path in sorted(self.folder.glob("answers-*-of-*.jsonl")):
            *lines, _torn = read_plain(path, _LARGEST_PART).split(b"\n")
            for answered in map(self._parsed, lines):
                if answered is not None:
                    found.setdefault(answered.index, answered)
        return found

    @contextmanager
    def writer(self, worker: Worker) -> Iterator["PartWriter"]:
        """What appends to the file of a process.

        Raises:
            TransientError, CheckpointError: see :func:`explained_write_faults`.
        """
        path = self.folder / f"answers-{worker.rank}-of-{worker.world_size}.jsonl"
        with explained_write_faults(path.parent, path.name, again=AGAIN):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            with explained_write_faults(path.parent, path.name, again=AGAIN):
                _cut_torn_line(file)
            yield PartWriter(path, file, self.questions)
        finally:
            os.close(file)

    def _parsed(self, line: bytes) -> Answered | None:
        try:
            value = json.loads(line)
            index, text, seconds = value["index"], value["text"], float(value["seconds"])
            known = type(index) is int and isinstance(text, str) and 0 <= index < len(self.questions)
            same = known and value["question_id"] == self.questions[index].question_id
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return Answered(index, text, seconds) if same else None


class PartWriter:
    """Appends whole lines."""

    def __init__(self, path: Path, file: int, questions: Sequence[Question]) -> None:
        self.path, self.file, self.questions = path, file, questions

    def __call__(self, batch: Sequence[Answered]) -> None:
        """The answers of a batch; they are in the file when this returns.

        Raises:
            TransientError, CheckpointError: see :func:`explained_write_faults`.
        """
        left = memoryview("".join(json_text(self._line(answered)) + "\n" for answered in batch).encode())
        with explained_write_faults(self.path.parent, self.path.name, again=AGAIN):
            while left:
                left = left[os.write(self.file, left) :]

    def _line(self, answered: Answered) -> dict[str, Any]:
        question_id = self.questions[answered.index].question_id
        return {
            "index": answered.index,
            "question_id": question_id,
            "text": answered.text,
            "seconds": round(answered.seconds, 6),
        }


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


def put_text(path: Path, text: str) -> None:
    """Put a whole file in its place in one step, whichever other process does the same.

    Raises:
        TransientError, CheckpointError: see :func:`explained_write_faults`.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    with explained_write_faults(path.parent, path.name, again=AGAIN):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

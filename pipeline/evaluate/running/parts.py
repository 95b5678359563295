"""Answers to a benchmark on disk while a run is under way: in the part files of :mod:`.part_lines`.

A line has the ``index`` of the question, its ``question_id``, ``text``, and ``seconds``. Whatever cannot be read is answered
again.
"""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkd.pipeline.evaluate.benchmarks.contract import Question
from alignkd.pipeline.evaluate.running.answering import Answered
from alignkd.pipeline.evaluate.running.part_lines import AGAIN, Append, appending, read_part_lines
from alignkd.pipeline.runtime.out_folder.write_faults import explained_write_faults
from alignkd.pipeline.runtime.ranks import Worker

__all__ = ["AGAIN", "PartWriter", "Parts", "put_text"]


class Parts:
    """The part files of one benchmark, in ``folder``."""

    def __init__(self, folder: Path, questions: Sequence[Question]) -> None:
        self.folder, self.questions = folder, questions

    def read(self) -> dict[int, Answered]:
        """What all processes of all runs have answered, by question."""
        found = dict[int, Answered]()
        for line in read_part_lines(self.folder):
            answered = self._parsed(line.value)
            if answered is not None:
                found.setdefault(answered.index, answered)
        return found

    @contextmanager
    def writer(self, worker: Worker) -> Iterator["PartWriter"]:
        """What appends to the file of a process.

        Raises:
            TransientError, CheckpointError: see :func:`explained_write_faults`.
        """
        with appending(self.folder, worker) as append:
            yield PartWriter(append, self.questions)

    def _parsed(self, value: Mapping[str, Any]) -> Answered | None:
        try:
            index, text, seconds = value["index"], value["text"], float(value["seconds"])
            known = type(index) is int and isinstance(text, str) and 0 <= index < len(self.questions)
            same = known and value["question_id"] == self.questions[index].question_id
        except (ValueError, TypeError, KeyError):
            return None
        return Answered(index, text, seconds) if same else None


class PartWriter:
    """Appends whole lines."""

    def __init__(self, append: Append, questions: Sequence[Question]) -> None:
        self.append, self.questions = append, questions

    def __call__(self, batch: Sequence[Answered]) -> None:
        """The answers of a batch; they are in the file when this returns.

        Raises:
            TransientError, CheckpointError: see :func:`explained_write_faults`.
        """
        self.append([self._line(answered) for answered in batch])

    def _line(self, answered: Answered) -> dict[str, Any]:
        question_id = self.questions[answered.index].question_id
        return {
            "index": answered.index,
            "question_id": question_id,
            "text": answered.text,
            "seconds": round(answered.seconds, 6),
        }


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

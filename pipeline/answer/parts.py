"""Answers on disk while a run is under way: in the part files of its folder, found again without their texts in memory.

A line is an answer (:class:`.answering.Answer`), or a sample that cannot be answered: ``index``, ``key``, ``rejected``. What
cannot be read, or is of another sample, is answered again; a rejected sample is tried again by the next run.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignkd.errors import TransientError
from alignkd.pipeline.answer.answering import Answer, Unit
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.evaluate.running.part_lines import AGAIN, Append, PartLine, appending, read_part_lines
from alignkd.pipeline.evaluate.running.questions import Unanswerable
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.plain_files import open_plain

_TYPES: dict[str, Any] = {field.name: field.type for field in fields(Answer)}


class AnswerParts:
    """The part files of one run, as they were when they were read."""

    def __init__(self, folder: Path, samples: Samples, answers: int) -> None:
        self.samples, self.answers = samples, answers
        self.files: list[Path] = []
        self.rejected: dict[int, str] = {}
        count = len(samples) * answers
        self._file, self._start, self._length = (
            np.full(count, -1, np.int32),
            np.zeros(count, np.int64),
            np.zeros(count, np.int64),
        )
        self._opened: dict[Path, BinaryIO] = {}
        for line in read_part_lines(folder):
            self._take(line)

    def __enter__(self) -> "AnswerParts":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def has(self, index: int, number: int) -> bool:
        """Whether an answer is there."""
        return bool(self._file[index * self.answers + number] >= 0)

    def has_all(self, units: Sequence[Unit]) -> bool:
        """Whether all of these answers are there."""
        return all(self.has(unit.question.index, unit.number) for unit in units)

    def is_answered(self, index: int) -> bool:
        """Whether all answers to a sample are there."""
        return bool((self._file[index * self.answers : (index + 1) * self.answers] >= 0).all())

    def answer(self, index: int, number: int) -> Answer:
        """An answer that is there.

        Raises:
            TransientError: its file has changed since.
        """
        place = index * self.answers + number
        path = self.files[self._file[place]]
        if path not in self._opened:
            self._opened[path] = open_plain(path)
        file = self._opened[path]
        file.seek(int(self._start[place]))
        found = _answer_of(_decoded(file.read(int(self._length[place]))))
        if found is None or (found.index, found.number) != (index, number):
            raise TransientError(f"{path} has changed while it was read: {AGAIN}")
        return found

    def _take(self, line: PartLine) -> None:
        found = _answer_of(line.value)
        if found is None:
            index, reason = line.value.get("index"), line.value.get("rejected")
            if type(index) is int and isinstance(reason, str) and self._is_of(index, line.value.get("key")):
                self.rejected[index] = reason
            return
        if (
            not self._is_of(found.index, found.key)
            or not 0 <= found.number < self.answers
            or self.has(found.index, found.number)
        ):
            return
        if not self.files or self.files[-1] != line.path:
            self.files.append(line.path)
        place = found.index * self.answers + found.number
        self._file[place], self._start[place], self._length[place] = len(self.files) - 1, line.start, line.length

    def _is_of(self, index: int, key: Any) -> bool:
        return 0 <= index < len(self.samples) and self.samples.key(index) == key


class AnswerWriter:
    """Appends answers, and samples that have none, to the file of a process; they are in it when a call returns."""

    def __init__(self, append: Append) -> None:
        self.append = append

    def answers(self, answers: Sequence[Answer]) -> None:
        """The answers of a batch."""
        self.append([asdict(answer) for answer in answers])

    def rejected(self, refused: Sequence[Unanswerable]) -> None:
        """Samples that cannot be put to the model."""
        self.append([{"index": one.index, "key": one.sample.key, "rejected": one.reason} for one in refused])


@contextmanager
def answer_writer(folder: Path, worker: Worker) -> Iterator[AnswerWriter]:
    """The writer of a process.

    Raises:
        TransientError, CheckpointError: the file cannot be written.
    """
    with appending(folder, worker) as append:
        yield AnswerWriter(append)


def _decoded(line: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _answer_of(value: Mapping[str, Any]) -> Answer | None:
    """The answer that a line holds; None where it holds another thing."""
    if any(type(value.get(name)) is not kind for name, kind in _TYPES.items()):
        return None
    return Answer(**{name: value[name] for name in _TYPES})

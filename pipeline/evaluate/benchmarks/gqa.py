"""GQA, test-dev balanced. Source of the rules: LLaVA's ``scripts/convert_gqa_for_eval.py``, then the official ``eval.py``."""

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.files import read_json, require_files
from alignkd.pipeline.evaluate.benchmarks.shared.fields import Entry, entry_of
from alignkd.pipeline.evaluate.benchmarks.shared.matching import by_id, require_all
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import SHORT_ANSWER, differs, read_questions, same_ids

OFFICIAL = "testdev_balanced_questions.json"
QUESTIONS = "llava_gqa_testdev_balanced.jsonl"

_LAST_STEPS = ("exist", "query: name", "choose name")
"""Operations that are not counted as a step of reasoning."""
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class _Row:
    question: str
    answer: str
    image: str
    balanced: bool
    structural: str
    semantic: str
    steps: int
    group: str | None

    @property
    def reference(self) -> str:
        return f"images/{self.image}"


class Gqa(Benchmark):
    """Short answers, right if they are equal to the one official answer."""

    about = About(
        name="gqa",
        title="GQA",
        source="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        licence="none stated by its authors; pictures from Visual Genome, COCO and Flickr under their terms",
        figure="accuracy, %",
    )
    _rows: Mapping[str, _Row]

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`; LLaVA's question file, where it is there, gives the order."""
        (path,) = require_files(folder, cls.about, [OFFICIAL])
        official = entry_of(read_json(path), str(path))
        rows = {name: _row(entry_of(value, f"{path}, question {name!r:.80}")) for name, value in official.value.items()}
        if not rows:
            raise DataError(f"{path} holds no questions; download it again")
        order = list(rows)
        if (question_file := folder / QUESTIONS).exists():
            order = _checked_order(question_file, rows)
        benchmark = cls(folder, protocol, [_question(name, rows[name]) for name in order])
        benchmark._rows = rows
        return benchmark

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`."""
        return 128 if self.protocol == "mobilevlm" else 16

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By id; the last of several answers counts, and every question, balanced or not, must have one."""
        matched = by_id(self.about, self.questions, answers)
        require_all(self.about, self.questions, matched)
        return matched

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """As :meth:`Benchmark.score`; questions that are not balanced are not counted, but by lmms-eval."""
        reading = _official_reading if self.protocol == "mobilevlm" else _lmms_eval_reading
        readings = tuple(
            reading(question, self._rows[str(question.question_id)], answer)
            for question, answer in zip(self.questions, answers, strict=True)
        )
        counted = [(self._rows[str(r.question.question_id)], r) for r in readings if r.counted]
        if not counted:
            raise DataError(
                f"{self.folder / OFFICIAL}: none of its questions is balanced, and no others count; download it again"
            )
        accuracy = _percent(reading for _, reading in counted)
        if self.protocol == "lmms-eval":
            return Score(accuracy, "percent", {"exact_match": accuracy / 100}, readings)
        return Score(accuracy, "percent", {"accuracy": accuracy, **_official_metrics(counted)}, readings)


def _row(entry: Entry) -> _Row:
    types, group = entry.entry("types"), entry.entry("groups")
    steps = [f"{step.text('operation')}: {step.text('argument')}" for step in entry.entries("semantic")]
    return _Row(
        question=entry.text("question"),
        answer=entry.text("answer"),
        image=f"{entry.text('imageId')}.jpg",
        balanced=entry.flag("isBalanced"),
        structural=types.text("structural"),
        semantic=types.text("semantic"),
        steps=sum(not any(last in step for last in _LAST_STEPS) for step in steps),
        group=None if group.value.get("global") is None else group.text("global"),
    )


def _question(name: str, row: _Row) -> Question:
    text = row.question + SHORT_ANSWER
    return Question(name, text, text, (row.reference,), (row.answer,), category=row.structural)


def _checked_order(path: Path, rows: Mapping[str, _Row]) -> list[str]:
    """The ids of a question file in its order.

    Raises:
        DataError: it does not ask what the official file holds.
    """
    lines = read_questions(path)
    same_ids(path, [line.question_id for line in lines], rows)
    for line in lines:
        row = rows[line.question_id]
        if line.text != row.question + SHORT_ANSWER:
            raise differs(line, "its text", line.text, row.question + SHORT_ANSWER)
        if line.image != row.image:
            raise differs(line, "its image", line.image, row.image)
    return [line.question_id for line in lines]


def _official_reading(question: Question, row: _Row, answer: Answer | None) -> Reading:
    # All full stops at the end go, then capitals; nothing else, and lower() is not casefold().
    parsed = "" if answer is None else answer.text.rstrip(".").lower()
    return _reading(question, answer, parsed, parsed == row.answer, counted=row.balanced)


def _lmms_eval_reading(question: Question, row: _Row, answer: Answer | None) -> Reading:
    parsed = "" if answer is None else answer.text.lower().translate(_WITHOUT_PUNCTUATION)
    equal = parsed == row.answer.lower().translate(_WITHOUT_PUNCTUATION)
    return _reading(question, answer, parsed, equal, counted=True)


def _reading(question: Question, answer: Answer | None, parsed: str, equal: bool, *, counted: bool) -> Reading:
    right = answer is not None and equal
    return Reading(question, answer.text if answer else None, parsed, float(right), counted)


def _percent(readings: Iterable[Reading]) -> float:
    scores = [reading.score for reading in readings]
    return 100 * sum(scores) / len(scores) if scores else 0.0


def _official_metrics(counted: Sequence[tuple[_Row, Reading]]) -> dict[str, Any]:
    def accuracy(keep: Callable[[_Row], bool]) -> float:
        return _percent(reading for row, reading in counted if keep(row))

    def by(key: Callable[[_Row], Any]) -> dict[str, Any]:
        groups: dict[Any, list[Reading]] = defaultdict(list)
        for row, reading in counted:
            groups[key(row)].append(reading)
        return {str(name): {"accuracy": _percent(group), "questions": len(group)} for name, group in sorted(groups.items())}

    return {
        "binary": accuracy(lambda row: row.structural != "query"),
        "open": accuracy(lambda row: row.structural == "query"),
        "distribution": _distribution(counted),
        "scored": len(counted),
        "per_structural_type": by(lambda row: row.structural),
        "per_semantic_type": by(lambda row: row.semantic),
        "per_steps": by(lambda row: row.steps),
        "per_words": by(lambda row: len(row.question.split())),
    }


def _distribution(counted: Sequence[tuple[_Row, Reading]]) -> float | None:
    """How far the answers given are from the right ones: chi-square by group, weighted by its questions, / 100.

    None where no question is in a group.
    """
    right: dict[str, Counter[str]] = defaultdict(Counter)
    given: dict[str, Counter[str]] = defaultdict(Counter)
    for row, reading in counted:
        if row.group is not None:
            right[row.group][row.answer] += 1
            given[row.group][reading.parsed] += 1
    distances = {
        group: sum((given[group][answer] - count) ** 2 / count for answer, count in answers.items())
        for group, answers in right.items()
    }
    total = sum(answers.total() for answers in right.values())
    if not total:
        return None
    return sum(distances[group] * answers.total() for group, answers in right.items()) / total / 100

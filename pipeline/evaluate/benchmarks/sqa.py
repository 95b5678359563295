"""ScienceQA, the test split; papers print its questions with a picture. Source of the rules: LLaVA's ``eval_science_qa.py``."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, ImageTreatment, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.files import read_json, require_files
from alignkd.pipeline.evaluate.benchmarks.shared.fields import Entry, described, entry_of
from alignkd.pipeline.evaluate.benchmarks.shared.matching import by_id
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import LETTER_ANSWER, Asked, differs, same_ids

PROBLEMS, SPLITS = "problems.json", "pid_splits.json"
QUESTIONS = "llava_test_CQM-A.json"

_LETTERS = "ABCDE"
_FAILED = "FAILED"
_MARK = "<image>"
_SENTENCE = re.compile("The answer is ([A-Z]).")


@dataclass(frozen=True)
class _Problem:
    text: str
    """As LLaVA asks it, without a marker and the final instruction."""
    parts: tuple[str, ...]
    """The question and its choices, as the official file has them."""
    image: str
    """Its file, relative to ``images/test``; empty where there is none."""
    choices: int
    answer: int
    subject: str


class ScienceQa(Benchmark):
    """Multiple choice with two to five choices; the answer is a letter."""

    about = About(
        name="sqa",
        title="ScienceQA-IMG",
        source="https://github.com/lupantech/ScienceQA (data/scienceqa, and tools/download.sh for the pictures)",
        licence="CC BY-NC-SA 4.0",
        figure="accuracy of the questions with a picture, %",
    )
    _problems: Mapping[str, _Problem]

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`; LLaVA's question file, where it is there, gives words and order."""
        problems_path, splits_path = require_files(folder, cls.about, [PROBLEMS, SPLITS])
        official = entry_of(read_json(problems_path), str(problems_path))
        wanted = list(dict.fromkeys(entry_of(read_json(splits_path), str(splits_path)).texts("test")))
        if not wanted:
            raise DataError(f"{splits_path}: 'test' is empty; download it again")
        if missing := [name for name in wanted if name not in official.value]:
            raise DataError(
                f"{problems_path} lacks {len(missing):,} of the {len(wanted):,} test questions that {splits_path.name} names"
                f" (the first: {missing[0]!r:.80}); download both again"
            )
        problems = {name: _problem(name, official.value[name], problems_path) for name in wanted}
        asked = {name: problem.text for name, problem in problems.items()}
        if (question_file := folder / QUESTIONS).exists():
            asked = _checked_texts(question_file, problems)
        if protocol == "lmms-eval":
            asked = {name: problems[name].text for name in asked if problems[name].image}
            if not asked:
                raise DataError(
                    f"{problems_path}: no test question has a picture; lmms-eval asks those alone; download it again"
                )
        benchmark = cls(folder, protocol, [_question(name, text, problems[name], protocol) for name, text in asked.items()])
        benchmark._problems = problems
        return benchmark

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`."""
        return 1024 if self.protocol == "mobilevlm" else 16

    @property
    def image_treatment(self) -> ImageTreatment:
        """MobileVLM's loader for this benchmark alone does not pad."""
        return "crop" if self.protocol == "mobilevlm" else "pad"

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By id, which is a text; the last of several answers counts, and questions may lack one."""
        return by_id(self.about, self.questions, answers)

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """As :meth:`Benchmark.score`; what counts is said by the recorded prompts, as the reference does it."""
        if self.protocol == "lmms-eval":
            return self._lmms_eval_score(answers)
        readings = tuple(self._reading(q, answer) for q, answer in zip(self.questions, answers, strict=True))
        with_image = [reading.score for reading in readings if reading.counted]
        if not with_image:
            raise DataError(
                f"no answered question has {_MARK} in its recorded 'prompt', and those alone are counted: the answer file must"
                f" record prompts with the marker, as LLaVA's and MobileVLM's loaders do"
            )
        correct, img_correct = sum(reading.score for reading in readings), sum(with_image)
        metrics = {
            "accuracy": 100 * correct / len(readings),
            "correct": int(correct),
            "total": len(readings),
            "img_accuracy": 100 * img_correct / len(with_image),
            "img_correct": int(img_correct),
            "img_total": len(with_image),
        }
        return Score(
            100 * img_correct / len(with_image),
            "percent",
            metrics,
            readings,
            self._about_missing(answers, "wrong in the total, not counted among those with a picture"),
        )

    def _lmms_eval_score(self, answers: Sequence[Answer | None]) -> Score:
        readings = tuple(self._lmms_eval_reading(q, answer) for q, answer in zip(self.questions, answers, strict=True))
        scores = [reading.score for reading in readings if reading.counted]
        if not scores:
            raise DataError("no question with a picture is answered; answer them, or score under the protocol mobilevlm")
        mean = sum(scores) / len(scores)
        metrics: dict[str, Any] = {"exact_match": mean, "questions": len(scores)}
        return Score(100 * mean, "percent", metrics, readings, self._about_missing(answers, "not counted"))

    def _reading(self, question: Question, answer: Answer | None) -> Reading:
        problem = self._problems[str(question.question_id)]
        letter = _FAILED if answer is None else read_letter(answer.text)
        right = letter in tuple(_LETTERS[: problem.choices]) and _LETTERS.index(letter) == problem.answer
        counted = answer is not None and _MARK in answer.prompt
        return Reading(question, answer.text if answer else None, letter, float(right), counted)

    def _lmms_eval_reading(self, question: Question, answer: Answer | None) -> Reading:
        if answer is None:
            return Reading(question, None, "", 0.0, counted=False)
        target, text = _LETTERS[self._problems[str(question.question_id)].answer], answer.text.strip()
        parsed = text[0] if len(text) >= 2 and text[0].isupper() and text[1] == "." else text
        return Reading(question, answer.text, parsed, float(parsed.lower() == target.lower()))

    def _about_missing(self, answers: Sequence[Answer | None], what: str) -> tuple[str, ...]:
        missing = sum(answer is None for answer in answers)
        return (f"{missing:,} of {len(answers):,} questions have no answer: {what}",) if missing else ()


def read_letter(text: str) -> str:
    """The letter that an answer names, by the first rule that applies; ``FAILED`` where none does."""
    if text in tuple(_LETTERS):
        return text
    if len(text) >= 3 and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]
    named: list[str] = _SENTENCE.findall(text)
    return named[0] if len(named) == 1 else _FAILED


def _problem(name: str, value: Any, path: Path) -> _Problem:
    entry = entry_of(value, f"{path}, question {name!r:.80}")
    choices, answer = entry.texts("choices"), entry.whole("answer")
    if not 1 <= len(choices) <= len(_LETTERS):
        raise DataError(f"{entry.where}: {len(choices)} choices, expected up to {len(_LETTERS)}; download it again")
    if not 0 <= answer < len(choices):
        raise DataError(f"{entry.where}: 'answer' is {answer}, expected the number of a choice, from 0; download it again")
    question, hint, image = entry.text("question"), entry.optional_text("hint"), entry.optional_text("image")
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))
    text = (f"Context: {hint}\n" if hint else "") + f"{question}\n{options}"
    return _Problem(
        text=text.replace(_MARK, "").strip(),
        parts=(question, *choices),
        image=f"{name}/{image}" if image else "",
        choices=len(choices),
        answer=answer,
        subject=entry.optional_text("subject"),
    )


def _question(name: str, text: str, problem: _Problem, protocol: str) -> Question:
    text += LETTER_ANSWER
    return Question(
        question_id=name,
        text=text,
        prompt=f"{_MARK}\n{text}" if problem.image and protocol == "mobilevlm" else text,
        images=(f"images/test/{problem.image}",) if problem.image else (),
        answers=(f"{_LETTERS[problem.answer]}. {problem.parts[1 + problem.answer]}",),
        category=problem.subject,
    )


def _checked_texts(path: Path, problems: Mapping[str, _Problem]) -> dict[str, str]:
    """The texts of LLaVA's question file by id, in its order.

    Raises:
        DataError: it is not in that format, or does not ask what the official files hold.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(
            f"{path}: found {described(records)}, expected a list of conversations; download it again, or remove it"
        )
    lines = [_asked(entry_of(record, f"{path}, record {number}")) for number, record in enumerate(records, start=1)]
    same_ids(path, [line.question_id for line in lines], problems)
    for line in lines:
        problem = problems[line.question_id]
        if line.image != problem.image:
            raise differs(line, "its image", line.image, problem.image)
        if not all(_plain(part) in _plain(line.text) for part in problem.parts):
            raise differs(line, "its text", line.text, problem.text)
    return {line.question_id: line.text for line in lines}


def _asked(record: Entry) -> Asked:
    turns = record.entries("conversations")
    if not turns or turns[0].text("from") != "human":
        raise DataError(f"{record.where}: its first turn is not the human's; download it again, or remove it")
    text = turns[0].text("value").replace(_MARK, "").strip()
    return Asked(record.text("id"), record.optional_text("image"), text, record.where)


def _plain(text: str) -> str:
    return " ".join(text.replace(_MARK, "").split())

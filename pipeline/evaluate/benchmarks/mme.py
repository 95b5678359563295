"""MME: two questions a picture, 14 categories. Source of the rules: LLaVA's ``convert_answer_to_mme.py``, then the official
``calculation.py`` (``eval_tool.zip``); lmms-eval's ``mme``."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.shared.matching import none_matches, refuse_twice
from alignkd.pipeline.evaluate.benchmarks.shared.mme_files import (
    COGNITION,
    ENDING,
    PERCEPTION,
    RELEASE,
    Key,
    Line,
    key_of,
    read_pictures,
    read_question_file,
    stem_of,
)
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import SHORT_ANSWER

QUESTIONS = "llava_mme.jsonl"

_Pair = tuple[Reading, Reading]


class Mme(Benchmark):
    """Yes or no, twice about each picture; both right is worth as much again."""

    about = About(
        name="mme",
        title="MME",
        source="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation (its authors send it)",
        licence="academic research only: no commercial use, no redistribution without Xiamen University's approval",
        figure="perception, points of 2,000",
    )

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`; LLaVA's question file, where it is there, gives the order. Pictures may be missing."""
        official = {
            (picture.category, picture.stem, asked.plain): (picture, asked)
            for picture in read_pictures(folder, cls.about)
            for asked in picture.asked
        }
        if (question_file := folder / QUESTIONS).exists():
            lines = read_question_file(question_file, official)
        else:
            lines = [
                Line(picture.reference, picture.reference, asked.plain + SHORT_ANSWER, picture, asked)
                for picture, asked in official.values()
            ]
        return cls(folder, protocol, [_question(line, protocol) for line in lines])

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`."""
        return 128 if self.protocol == "mobilevlm" else 16

    def units(self) -> list[tuple[int, ...]]:
        """The two questions about each picture."""
        pairs: dict[tuple[str, str], list[int]] = {}
        for index, question in enumerate(self.questions):
            pairs.setdefault((question.category, stem_of(str(question.question_id))), []).append(index)
        return [tuple(pair) for pair in pairs.values()]

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By category, picture and question; both questions about a picture may lack an answer.

        ``mobilevlm``: the two lines about a picture follow each other within the category, since the official tool pairs
        lines by order.
        """
        keys = [key_of(question.question_id, question.prompt) for question in self.questions]
        known, found = set(keys), dict[Key, Answer]()
        if not any(key_of(answer.question_id, answer.prompt) in known for answer in answers):
            raise none_matches(self.about, self.questions, answers)
        for answer in answers:
            if (key := key_of(answer.question_id, answer.prompt)) not in known:
                raise DataError(
                    f"line {answer.line} of the answer file asks {answer.prompt!r:.120} about {answer.question_id!r:.80}, which"
                    " no official file does; 'question_id' is the picture and 'prompt' the question, as LLaVA's question file"
                    " has them"
                )
            refuse_twice(found.setdefault(key, answer), answer)
        if self.protocol == "mobilevlm":
            _require_order(found)
        return [found.get(key) for key in keys]

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """As :meth:`Benchmark.score`.

        Raises:
            DataError: one of two answers about a picture is missing, or a category has none; under ``mobilevlm``, unless
                this is a sample, an answer holds a tab or a line break, or no answer of a category is yes or no.
        """
        read = read_official if self.protocol == "mobilevlm" else read_lmms_eval
        readings = tuple(_reading(q, a, read) for q, a in zip(self.questions, answers, strict=True))
        pairs = [(readings[first], readings[second]) for first, second in self.units()]
        answered = {category: _answered(category, pairs) for category in dict.fromkeys(r.question.category for r in readings)}
        if self.protocol == "mobilevlm" and not self.sampled:
            _require_single_fields(answers)
            _require_yes_or_no(answered)
        tasks = {category: _category_score(group) for category, group in answered.items()}
        perception, cognition = ({c: tasks[c] for c in names if c in tasks} for names in (PERCEPTION, COGNITION))
        unanswered = [r for pair in pairs for r in pair[:1] if r.prediction is None]
        metrics: dict[str, Any] = {
            **{"perception": sum(perception.values()), "perception_tasks": perception},
            **{"cognition": sum(cognition.values()), "cognition_tasks": cognition},
        }
        if self.protocol == "lmms-eval":
            metrics = {"mme_perception_score": metrics["perception"], "mme_cognition_score": metrics["cognition"], **metrics}
        metrics["pictures_without_answers"] = len(unanswered)
        return Score(sum(perception.values()), "points", metrics, readings, tuple(_notes(unanswered, tasks)))


def read_official(text: str) -> str:
    """``yes`` if that occurs in the first four characters, in any case, else ``no`` if that does, else ``other``."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def read_lmms_eval(text: str) -> str:
    """As :func:`read_official` once spaces around and all full stops are gone; a single ``y`` or ``n`` counts too."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text) or read_official(text)


def _reading(question: Question, answer: Answer | None, read: Callable[[str], str]) -> Reading:
    parsed = "" if answer is None else read(answer.text)
    right = parsed == question.answers[0].lower()
    return Reading(question, answer.text if answer else None, parsed, float(right), counted=answer is not None)


def _question(line: Line, protocol: str) -> Question:
    text = line.text
    if protocol == "lmms-eval":  # which takes one space away with the ending, so a question with two keeps one
        text = line.asked.text.strip().replace(f" {ENDING}", "") + SHORT_ANSWER
    return Question(line.question_id, text, text, (f"{RELEASE}/{line.image}",), (line.asked.label,), line.picture.category)


def _require_order(found: Mapping[Key, Answer]) -> None:
    for category in dict.fromkeys(key[0] for key in found):
        lines = [(key[1], answer) for key, answer in found.items() if key[0] == category]
        for (first, _), (second, answer) in zip(lines[::2], lines[1::2], strict=False):
            if first == second:
                continue
            if sum(stem == first for stem, _ in lines) == 2:
                raise DataError(
                    f"line {answer.line} of the answer file is about {category}/{second}, but the line of {category} before"
                    f" it is one of two about {first}; the official tool pairs lines by order: put both in a row"
                )
            raise _half(category, first)


def _half(category: str, stem: str) -> DataError:
    return DataError(
        f"MME: one of the two answers about {category}/{stem} is missing; half a pair has no score: answer both questions"
    )


def _require_single_fields(answers: Sequence[Answer | None]) -> None:
    for answer in answers:
        if answer is not None and (mark := next((mark for mark in "\t\n\r" if mark in answer.text), None)):
            raise DataError(
                f"line {answer.line} of the answer file: the answer {answer.text!r:.80} holds {mark!r}, on which the official"
                " tool fails, for its files have one line an answer and tabs between fields; put a space there, or score with"
                " --protocol lmms-eval"
            )


def _answered(category: str, pairs: Sequence[_Pair]) -> list[_Pair]:
    """The pairs of a category that are answered."""
    of_category = [pair for pair in pairs if pair[0].question.category == category]
    for first, second in of_category:
        if (first.prediction is None) != (second.prediction is None):
            raise _half(category, stem_of(str(first.question.question_id)))
    answered = [pair for pair in of_category if pair[0].prediction is not None]
    if not answered:
        raise DataError(f"MME: no question of the category {category} is answered, and each of the 14 counts: answer them")
    return answered


def _require_yes_or_no(answered: Mapping[str, Sequence[_Pair]]) -> None:
    for category, pairs in answered.items():
        if all(reading.parsed == "other" for pair in pairs for reading in pair):
            raise DataError(
                f"MME: not one answer of the category {category} is read as yes or no (the first:"
                f" {pairs[0][0].prediction!r:.80}), on which the official tool fails; --protocol lmms-eval scores it"
            )


def _category_score(pairs: Sequence[_Pair]) -> float:
    """Accuracy over questions plus accuracy over pictures with both right, each of 100."""
    right = [first.score + second.score for first, second in pairs]
    return 100 * sum(right) / (2 * len(pairs)) + 100 * sum(count == 2 for count in right) / len(pairs)


def _notes(unanswered: Sequence[Reading], tasks: Mapping[str, float]) -> list[str]:
    notes = []
    if unanswered:
        notes.append(
            f"{len(unanswered):,} pictures have no answers (the first: {unanswered[0].question.question_id}) and are left out;"
            " the official tool averages over that without a word"
        )
    if absent := len(PERCEPTION) + len(COGNITION) - len(tasks):
        notes.append(f"{absent} of the 14 categories are not among these questions: sums are not out of 2,000 and 800")
    return notes

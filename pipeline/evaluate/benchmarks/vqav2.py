"""VQAv2, validation. Source of the rules: LLaVA's ``convert_vqav2_for_submission.py``, then the official ``vqaEval.py``."""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.files import read_json, require_files
from alignkd.pipeline.evaluate.benchmarks.shared.fields import Entry, entry_of
from alignkd.pipeline.evaluate.benchmarks.shared.matching import by_id, require_all
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import SHORT_ANSWER
from alignkd.pipeline.evaluate.benchmarks.shared.vqa_text import agreement, m4c_text, vqa_text

ASKED = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"

_PEOPLE = 10


@dataclass(frozen=True)
class _Annotation:
    image_id: int
    question_type: str
    answer_type: str
    answers: tuple[str, ...]


class VqaV2(Benchmark):
    """Short answers, worth more the more of ten people gave the same."""

    about = About(
        name="vqav2",
        title="VQAv2",
        source="https://visualqa.org/download.html (validation questions and annotations, and COCO's val2014 pictures)",
        licence="CC BY 4.0; pictures from COCO under Flickr's terms",
        figure="VQA accuracy, %",
    )
    _annotations: Mapping[int, _Annotation]

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`."""
        asked_path, annotations_path = require_files(folder, cls.about, [ASKED, ANNOTATIONS])
        annotations = {
            entry.whole("question_id"): _annotation(entry)
            for entry in entry_of(read_json(annotations_path), str(annotations_path)).entries("annotations")
        }
        questions: dict[int, Question] = {}
        for entry in entry_of(read_json(asked_path), str(asked_path)).entries("questions"):
            name = entry.whole("question_id")
            if name in questions:
                raise DataError(f"{entry.where}: question {name} stands twice; download the official file again")
            if name not in annotations or annotations[name].image_id != entry.whole("image_id"):
                raise DataError(
                    f"{entry.where}: {annotations_path.name} has no annotation of question {name} about this picture; the files"
                    " are of different splits or versions: download both again"
                )
            questions[name] = _question(name, entry, annotations[name])
        if not questions:
            raise DataError(f"{asked_path}: 'questions' is empty; download it again")
        benchmark = cls(folder, protocol, list(questions.values()))
        benchmark._annotations = annotations
        return benchmark

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`."""
        return 128 if self.protocol == "mobilevlm" else 16

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By id, which is a whole number; just these questions must be answered, as the official tool demands."""
        matched = by_id(self.about, self.questions, answers)
        require_all(self.about, self.questions, matched)
        known = {question.question_id for question in self.questions}
        if unknown := [answer for answer in answers if answer.question_id not in known]:
            raise DataError(
                f"{len(unknown):,} lines of the answer file are about no question of {self.about.title} (the first: line"
                f" {unknown[0].line}, {unknown[0].question_id!r:.80}); its official scorer refuses that too: remove them"
            )
        return matched

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """As :meth:`Benchmark.score`."""
        read = _read_official if self.protocol == "mobilevlm" else _read_lmms_eval
        readings = tuple(_reading(q, answer, read) for q, answer in zip(self.questions, answers, strict=True))
        if not readings:
            raise DataError(f"{self.about.title}: there is no question to score")
        mean = _mean(readings)
        if self.protocol == "lmms-eval":
            return Score(100 * mean, "percent", {"exact_match": mean}, readings)
        metrics = {
            "accuracy": 100 * mean,
            "per_answer_type": self._by(lambda annotation: annotation.answer_type, readings),
            "per_question_type": self._by(lambda annotation: annotation.question_type, readings),
        }
        return Score(100 * mean, "percent", metrics, readings)

    def _by(self, key: Callable[[_Annotation], str], readings: Sequence[Reading]) -> dict[str, Any]:
        groups: dict[str, list[Reading]] = defaultdict(list)
        for reading in readings:
            groups[key(self._annotations[int(reading.question.question_id)])].append(reading)
        return {name: {"accuracy": 100 * _mean(group), "questions": len(group)} for name, group in sorted(groups.items())}


def _annotation(entry: Entry) -> _Annotation:
    answers = tuple(answer.text("answer") for answer in entry.entries("answers"))
    if len(answers) != _PEOPLE:
        raise DataError(f"{entry.where}: {len(answers)} answers, expected {_PEOPLE}; download the official file again")
    return _Annotation(entry.whole("image_id"), entry.text("question_type"), entry.text("answer_type"), answers)


def _question(name: int, entry: Entry, annotation: _Annotation) -> Question:
    text = entry.text("question") + SHORT_ANSWER
    picture = f"val2014/COCO_val2014_{annotation.image_id:012d}.jpg"
    return Question(name, text, text, (picture,), annotation.answers, category=annotation.answer_type)


def _reading(question: Question, answer: Answer | None, read: Callable[[str, Sequence[str]], tuple[str, list[str]]]) -> Reading:
    if answer is None:
        return Reading(question, None, "", 0.0)
    parsed, given = read(answer.text, question.answers)
    return Reading(question, answer.text, parsed, agreement(Counter(given)[parsed], len(given)))


def _read_official(text: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    # LLaVA submits TextVQA's normal form; the official tool leaves all as it is where people agree to the character.
    text, given = m4c_text(text), [answer.replace("\n", " ").replace("\t", " ").strip() for answer in answers]
    return (text, given) if len(set(given)) == 1 else (vqa_text(text), [vqa_text(answer) for answer in given])


def _read_lmms_eval(text: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    return vqa_text(text), [vqa_text(answer) for answer in answers]


def _mean(readings: Sequence[Reading]) -> float:
    return sum(reading.score for reading in readings) / len(readings)

"""POPE on COCO: is a thing in the picture. Source of the rules: LLaVA's ``llava/eval/eval_pope.py``; lmms-eval's ``pope``."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.files import read_json_lines, require_files
from alignkd.pipeline.evaluate.benchmarks.shared.fields import Entry
from alignkd.pipeline.evaluate.benchmarks.shared.matching import one_each, require_asked
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import SHORT_ANSWER, Asked, differs

CATEGORIES = ("adversarial", "random", "popular")
"""In the order of LLaVA's question file."""
QUESTIONS = "llava_pope_test.jsonl"

_APART = 10_000_000
"""LLaVA's ids are the official ones, and this much more for each category."""
_VERSIONS: dict[tuple[int, ...], str] = {
    (3000, 2910, 3000): "2,910 random questions (commit e3e3926, to which LLaVA's question file belongs)",
    (3000, 3000, 3000): "3,000 random questions (later than LLaVA's question file)",
}
_PRESUMED = "the mean of the three F1 is what LLaVA-1.5 reports; that MobileVLM reports the same is presumed"


@dataclass(frozen=True)
class _Row:
    number: int
    image: str
    text: str
    label: str


class Pope(Benchmark):
    """Yes or no, in three categories; labels belong to answers by their order in a category."""

    about = About(
        name="pope",
        title="POPE",
        source="https://github.com/AoiDragon/POPE (output/coco, commit e3e3926 for LLaVA's question file) and COCO's val2014",
        licence="MIT; COCO pictures under their Flickr terms",
        figure="mean F1 of three categories, %",
    )
    _counts: Mapping[str, int]

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`; LLaVA's question file is refused if it is of another version than the labels."""
        paths = require_files(folder, cls.about, [f"coco/coco_pope_{category}.json" for category in CATEGORIES])
        rows = {category: _rows(path) for category, path in zip(CATEGORIES, paths, strict=True)}
        if (question_file := folder / QUESTIONS).exists():
            questions = _checked_questions(question_file, rows)
        else:
            questions = [
                _question(row.number + _APART * place, category, row, row.text + SHORT_ANSWER)
                for place, category in enumerate(CATEGORIES)
                for row in rows[category]
            ]
        if len({question.question_id for question in questions}) < len(questions):
            raise DataError(f"{folder}: two questions of {cls.about.title} have the same id; download the official files again")
        benchmark = cls(folder, protocol, questions)
        benchmark._counts = {category: len(rows[category]) for category in CATEGORIES}
        return benchmark

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`; lmms-eval's number is the same."""
        return 128

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which version of the labels: with 2,910 random questions or with 3,000."""
        known = _VERSIONS.get(tuple(self._counts.values()))
        return {"data_version": known or ", ".join(f"{count:,} {category}" for category, count in self._counts.items())}

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By id, one line a question; a recorded prompt must hold that question.

        ``mobilevlm``: in the order of the questions within a category, since LLaVA's scorer pairs labels by order and would
        score another order wrong without a word.
        """
        matched = one_each(self.about, self.questions, answers, "labels are paired with answers by order")
        for question, answer in zip(self.questions, matched, strict=True):
            asked = replace(answer, prompt=_one_spelling(answer.prompt))
            require_asked(self.about, _one_spelling(question.text.removesuffix(SHORT_ANSWER)), asked)
        if self.protocol == "mobilevlm":
            last: dict[str, Answer] = {}
            for question, answer in zip(self.questions, matched, strict=True):
                if answer.line < (before := last.get(question.category, answer)).line:
                    raise DataError(
                        f"line {answer.line} of the answer file ({question.category} question {question.question_id}) stands"
                        f" before line {before.line}, which answers an earlier question; LLaVA's scorer pairs labels by order:"
                        f" put the {question.category} answers in the order of the questions"
                    )
                last[question.category] = answer
        return list(matched)

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """As :meth:`Benchmark.score`.

        Raises:
            DataError: under ``mobilevlm``, no "yes" of a category is right: its F1 is 0 / 0, which is 0 in a sample alone.
        """
        read = read_yes_no if self.protocol == "mobilevlm" else _stripped
        readings = tuple(_reading(question, answer, read) for question, answer in zip(self.questions, answers, strict=True))
        groups = {c: group for c in CATEGORIES if (group := [r for r in readings if r.question.category == c])}
        absent = [category for category in CATEGORIES if category not in groups]
        notes = [f"no question of the category {', '.join(absent)} is among these"] if absent else []
        if tuple(self._counts.values()) not in _VERSIONS:
            notes.append("the official files hold other numbers of questions than any version known")
        if self.protocol == "lmms-eval":
            pooled = _lmms_eval_scores(readings)
            metrics = {"pooled": pooled, "by_category": {c: _lmms_eval_scores(group) for c, group in groups.items()}}
            notes.append("the score is lmms-eval's pooled F1; its precision and recall leave out what is neither yes nor no")
            return Score(100 * pooled["f1_score"], "percent", metrics, readings, tuple(notes))
        categories = {category: _llava_scores(group) for category, group in groups.items()}
        for category in [category for category, scores in categories.items() if not scores["TP"]]:
            undefined = f"{category}: of {len(groups[category]):,} answers none is rightly read as yes, so F1 is 0 / 0"
            if not self.sampled:
                raise DataError(
                    f"{self.about.title}, {undefined}, on which LLaVA's scorer fails; --protocol lmms-eval counts it as 0"
                )
            notes.append(f"{undefined}, counted as 0")
        f1 = sum(scores["f1"] for scores in categories.values()) / len(categories)
        accuracy = sum(scores["accuracy"] for scores in categories.values()) / len(categories)
        metrics = {"categories": categories, "mean_f1": f1, "mean_accuracy": accuracy, "bunny_printed_average_f1": f1}
        return Score(100 * f1, "percent", metrics, readings, (_PRESUMED, *notes))


def read_yes_no(text: str) -> str:
    """``no`` if one word of the first sentence, commas deleted, is exactly ``No``, ``no`` or ``not``; else ``yes``."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _stripped(text: str) -> str:
    return text.lower().strip()


def _reading(question: Question, answer: Answer | None, read: Callable[[str], str]) -> Reading:
    # Without an answer (which match refuses) nothing is read.
    parsed = "" if answer is None else read(answer.text)
    return Reading(question, answer.text if answer else None, parsed, float(parsed == question.answers[0]))


def _rows(path: Path) -> list[_Row]:
    rows = []
    for number, value in read_json_lines(path):
        entry = Entry(value, f"{path}, line {number}")
        label = entry.text("label").strip().lower()
        if label not in ("yes", "no"):
            raise DataError(f"{entry.where}: 'label' is {label!r:.80}, expected yes or no; download the official file again")
        rows.append(_Row(entry.whole("question_id"), entry.text("image"), entry.text("text"), label))
    if not rows:
        raise DataError(f"{path} holds no questions; download it again")
    return rows


def _question(number: int, category: str, row: _Row, text: str) -> Question:
    return Question(number, text, text, (f"val2014/{row.image}",), (row.label,), category)


def _checked_questions(path: Path, rows: Mapping[str, Sequence[_Row]]) -> list[Question]:
    """The lines of LLaVA's question file with their labels.

    Raises:
        DataError: it does not ask what the official files hold, in count, image and text.
    """
    lines = [Entry(line, f"{path}, line {number}") for number, line in read_json_lines(path)]
    counts = Counter(line.text("category") for line in lines)
    official = {category: len(rows[category]) for category in CATEGORIES}
    if counts != official:
        raise DataError(
            f"{path} asks {_in_words(counts)}, the official files hold {_in_words(official)}: they are of different versions"
            " (2,910 random questions belong to LLaVA's question file, 3,000 are later), and labels would be paired wrong; get"
            " the official files of commit e3e3926, or remove the question file: questions are built without it"
        )
    left = {category: iter(rows[category]) for category in CATEGORIES}
    questions = []
    for line in lines:
        category, text = line.text("category"), line.text("text")
        row = next(left[category])
        asked = Asked(str(line.whole("question_id")), line.text("image"), text, line.where)
        if asked.image != row.image:
            raise differs(asked, "its image", asked.image, row.image)
        if _one_spelling(text) != _one_spelling(row.text + SHORT_ANSWER):
            raise differs(asked, "its text", text, row.text + SHORT_ANSWER)
        questions.append(_question(line.whole("question_id"), category, row, text))
    return questions


def _one_spelling(text: str) -> str:
    # The one difference between versions that leaves labels where they are.
    return text.replace(" imange?", " image?")


def _in_words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {category!r:.40}" for category, count in counts.items()) or "nothing"


def _counts_of(readings: Sequence[Reading]) -> tuple[int, int, int, int]:
    """Right and wrong "yes", right and wrong "no"."""
    counts = Counter((r.parsed, r.question.answers[0]) for r in readings)
    return counts["yes", "yes"], counts["yes", "no"], counts["no", "no"], counts["no", "yes"]


def _llava_scores(readings: Sequence[Reading]) -> dict[str, float]:
    tp, fp, tn, fn = _counts_of(readings)
    precision, recall = tp / (tp + fp or 1), tp / (tp + fn or 1)
    return {
        **{"samples": len(readings), "TP": tp, "FP": fp, "TN": tn, "FN": fn, "accuracy": (tp + tn) / len(readings)},
        **{"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall or 1)},
        "yes_ratio": (tp + fp) / len(readings),
    }


def _lmms_eval_scores(readings: Sequence[Reading]) -> dict[str, float]:
    tp, fp, _, fn = _counts_of(readings)
    precision, recall = tp / (tp + fp or 1), tp / (tp + fn or 1)
    return {
        "accuracy": sum(reading.score for reading in readings) / len(readings),
        **{"precision": precision, "recall": recall, "f1_score": 2 * precision * recall / (precision + recall or 1)},
        "yes_ratio": sum(reading.question.answers[0] == "yes" for reading in readings) / len(readings),
    }

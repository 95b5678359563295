"""MMBench-dev, English, v1.0, with circular evaluation. Source of the rules: MobileVLM's ``model_vqa_mmbench.py`` (prompts),
OpenCompass's ``tools/eval_mmbench.py`` (scores) without its GPT judge; lmms-eval's ``mmbench_en_dev_static``."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import (
    About,
    Answer,
    Benchmark,
    ImageTreatment,
    Question,
    Reading,
    Score,
)
from alignkd.pipeline.evaluate.benchmarks.shared.matching import by_id, require_all, require_asked
from alignkd.pipeline.evaluate.benchmarks.shared.mmbench_file import A_PASS, Table, Task, read_table
from alignkd.pipeline.evaluate.benchmarks.shared.option_letters import letter_or_option, likeliest_letter
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import LETTER_ANSWER

_LOST = re.compile(r"none|nan|null|n/?a|<na>|#n/?a", re.IGNORECASE)
"""Option texts that MobileVLM's loader, through pandas, takes for no option."""
_PRESUMED = "circular evaluation by OpenCompass's rules; that MobileVLM aggregates and reads letters so is presumed"


class MmBench(Benchmark):
    """Multiple choice, asked once for each option that could stand first; only all right count."""

    about = About(
        name="mmbench",
        title="MMBench",
        source="https://github.com/open-compass/MMBench (the English dev split of v1.0)",
        licence="Apache-2.0 (repository), CC BY 4.0 (dataset card); pictures from many sources",
        figure="circular accuracy on dev, %",
    )
    _table: Table

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`; the pictures stay in the file."""
        table = read_table(folder, cls.about)
        questions = [_question(task, protocol) for task in table.tasks.values()]
        benchmark = cls(folder, protocol, questions, _notes(table.tasks))
        benchmark._table = table
        return benchmark

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`; lmms-eval's number is the same."""
        return 1024

    @property
    def image_treatment(self) -> ImageTreatment:
        """Padded in the picture's own mode."""
        return "pad-own-mode"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which of the official files was read, and that no judge was asked."""
        return {"official_file": self._table.path.name, "judge": "none"}

    def read_image(self, reference: str) -> bytes:
        """The picture of the row with this index, decoded from base64.

        Raises:
            DataError: no row holds it, or it is no base64.
        """
        return self._table.picture(reference)

    def missing_images(self) -> list[str]:
        """Indices of rows that should hold a picture and do not."""
        named = dict.fromkeys(reference for question in self.questions for reference in question.images)
        return [reference for reference in named if reference not in self._table.pictures]

    def units(self) -> list[tuple[int, ...]]:
        """The passes of each question."""
        passes: dict[int, list[int]] = {}
        for place, question in enumerate(self.questions):
            passes.setdefault(int(question.question_id) % A_PASS, []).append(place)
        return [tuple(group) for group in passes.values()]

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By index; the last of several equal answers counts, every pass must have one, and a recorded prompt its question."""
        matched = by_id(self.about, self.questions, answers)
        require_all(self.about, self.questions, matched, "a question counts only if all its passes are right")
        for task, answer in zip((self._table.tasks[int(q.question_id)] for q in self.questions), matched, strict=True):
            if answer is not None:
                require_asked(self.about, task.question, answer)
        given = {answer.question_id: answer for answer in matched if answer is not None}
        for answer in answers:
            if (last := given.get(answer.question_id)) is not None and last.text != answer.text:
                raise DataError(
                    f"lines {answer.line} and {last.line} of the answer file answer {answer.question_id} differently; give one"
                    " answer a row (without --all-rounds: the rows of the official file are the rounds)"
                )
        return matched

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """As :meth:`Benchmark.score`; what no rule decides is wrong, and counted in ``undecided``."""
        readings = tuple(self._reading(q, a) for q, a in zip(self.questions, answers, strict=True))
        hits, first_passes = dict[int, float](), list[float]()
        for unit in self.units():
            passes = [readings[place] for place in unit]
            index = min(int(reading.question.question_id) for reading in passes)
            hits[index] = float(all(reading.score for reading in passes))
            first_passes += [r.score for r in passes if r.question.question_id == index]
        circular, undecided = _mean(hits.values()), sum(not reading.parsed for reading in readings)
        by_skill = {
            "l2": _means((self._table.tasks[index].area, hit) for index, hit in hits.items()),
            "category": _means((self._table.tasks[index].category, hit) for index, hit in hits.items()),
        }
        metrics: dict[str, Any] = {
            **{"circular_dev": circular, "questions": len(hits), "rows": len(readings), **by_skill},
            **{"first_pass_only": _mean(first_passes), "all_rows": _mean(r.score for r in readings), "undecided": undecided},
        }
        notes = []
        if undecided:
            notes.append(f"{undecided:,} of {len(readings):,} answers name no option, and no judge was asked: wrong")
        if self.protocol == "lmms-eval":
            metrics = {"gpt_eval_score": 100 * circular, **metrics}
        else:
            notes.insert(0, _PRESUMED)
        return Score(100 * circular, "percent", metrics, readings, tuple(notes))

    def _reading(self, question: Question, answer: Answer | None) -> Reading:
        if answer is None:
            return Reading(question, None, "", 0.0)
        options, text = self._table.tasks[int(question.question_id)].options, answer.text
        parsed = letter_or_option(text, options)
        if self.protocol == "lmms-eval":
            text = text.strip()
            parsed = letter_or_option(text, options) or likeliest_letter(text, sorted(options))
        return Reading(question, answer.text, parsed, float(parsed == question.answers[0]))


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for name, value in pairs:
        groups.setdefault(name, []).append(value)
    return {name: _mean(groups[name]) for name in sorted(groups)}


def _question(task: Task, protocol: str) -> Question:
    lines = "\n".join(f"{letter}. {text}" for letter, text in task.options.items())
    if protocol == "mobilevlm":
        prompt = "\n".join([*filter(None, [task.hint]), task.question, lines])
        text = prompt + LETTER_ANSWER
    else:
        asked = " ".join([*filter(None, [task.hint]), task.question, "There are several options:"])
        prompt = text = f"{asked}\n{lines}".rstrip("\n") + "\n" + LETTER_ANSWER
    extra = {"round_id": 0, "options": list(task.options.values()), "option_char": list(task.options)}
    return Question(task.index, text, prompt, (task.picture,), (task.answer,), task.category, extra)


def _notes(tasks: Mapping[int, Task]) -> list[str]:
    notes = []
    if lost := sum(any(_LOST.fullmatch(text) for text in task.options.values()) for task in tasks.values()):
        notes.append(
            f"{lost:,} rows have an option such as N/A or none, which is text here; MobileVLM's loader takes it for no option"
            " and leaves it out of the prompt, with those after it"
        )
    passes = Counter(index % A_PASS for index in tasks)
    if few := sum(passes[index] < len(task.options) for index, task in tasks.items() if index < A_PASS):
        notes.append(f"{few:,} questions have fewer passes than options in the official file, which makes them easier")
    return notes

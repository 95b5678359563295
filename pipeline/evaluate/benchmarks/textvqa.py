"""TextVQA, validation. Source of the rules: ``eval_textvqa.py`` and ``m4c_evaluator.py`` of LLaVA and MobileVLM."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.files import read_json, require_files
from alignkd.pipeline.evaluate.benchmarks.shared.fields import entry_of
from alignkd.pipeline.evaluate.benchmarks.shared.matching import none_matches
from alignkd.pipeline.evaluate.benchmarks.shared.question_file import SHORT_ANSWER, differs, read_questions
from alignkd.pipeline.evaluate.benchmarks.shared.vqa_text import agreement, m4c_text

OFFICIAL = "TextVQA_0.5.1_val.json"
OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
QUESTIONS = ("llava_textvqa_val_v051_ocr.jsonl", "llava_textvqa_val_v051_no_ocr.jsonl")
"""The first of them that is there is asked."""

_PEOPLE = 10
_OCR_LINE = "Reference OCR token: "

_Key = tuple[str, str]
"""A picture, and a question about it in lower case."""


@dataclass(frozen=True)
class _Row:
    question: str
    image_id: str
    number: int
    answers: tuple[str, ...]

    @property
    def key(self) -> _Key:
        return self.image_id, self.question.lower()


class TextVqa(Benchmark):
    """Short answers, worth more the more of ten people gave the same."""

    about = About(
        name="textvqa",
        title="TextVQA",
        source="https://textvqa.org/dataset (the questions, Rosetta's OCR tokens v0.2, and the pictures)",
        licence="CC BY 4.0; pictures from OpenImages under their terms",
        figure="VQA accuracy, %",
    )

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`; LLaVA's question file, where it is there, gives words and order.

        MobileVLM's prompts hold OCR tokens, unless the question file without them is the only source; lmms-eval's do not.
        """
        question_file = next((folder / name for name in QUESTIONS if (folder / name).exists()), None)
        from_file = question_file is not None and protocol == "mobilevlm"
        needed = [OFFICIAL] if from_file or protocol == "lmms-eval" else [OFFICIAL, OCR]
        path, *ocr_path = require_files(folder, cls.about, needed)
        rows = _rows(path)
        if from_file and question_file is not None:
            asked = _checked_texts(question_file, rows)
        else:
            tokens = _tokens(ocr_path[0], rows) if ocr_path else None
            asked = [(row, _text(row, tokens)) for row in sorted(rows.values(), key=lambda row: row.number)]
        return cls(folder, protocol, [_question(row, text) for row, text in asked])

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`; lmms-eval leaves it to the model, where LLaVA's has 1,024."""
        return 128 if self.protocol == "mobilevlm" else 1024

    @property
    def settings(self) -> Mapping[str, Any]:
        """Whether prompts hold OCR tokens."""
        return {"ocr_tokens": _share_with_ocr([question.prompt for question in self.questions])}

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By picture and the first line of the prompt, in lower case; questions may lack an answer, and no line a question."""
        found: dict[_Key, Answer] = {}
        unknown: list[tuple[Answer, _Key]] = []
        known = {_key_of(question) for question in self.questions}
        for answer in answers:
            key = str(answer.question_id), _asked_in(answer)
            if key not in known or not isinstance(answer.question_id, str):
                unknown.append((answer, key))
            elif key in found:
                raise DataError(
                    f"lines {found[key].line} and {answer.line} of the answer file answer the same question ({key[1]!r:.80}"
                    f" about picture {key[0]!r:.80}); leave one of them"
                )
            else:
                found[key] = answer
        if not found:
            raise none_matches(self.about, self.questions, answers)
        if unknown:
            answer, key = unknown[0]
            raise DataError(
                f"{len(unknown):,} lines of the answer file are about no question of {self.about.title} (the first: line"
                f" {answer.line}, {key[1]!r:.80} about picture {answer.question_id!r:.80}); remove them"
            )
        return [found.get(_key_of(question)) for question in self.questions]

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """As :meth:`Benchmark.score`; the mean is over the questions that are answered."""
        normal: dict[str, str] = {}

        def normalised(text: str) -> str:
            if text not in normal:
                normal[text] = m4c_text(text)
            return normal[text]

        readings = tuple(
            _reading(question, answer, Counter(map(normalised, question.answers)))
            for question, answer in zip(self.questions, answers, strict=True)
        )
        scores = [reading.score for reading in readings if reading.counted]
        if not scores:
            raise DataError(f"none of the {len(self.questions):,} questions of {self.about.title} is answered; answer them")
        mean, missing = sum(scores) / len(scores), len(readings) - len(scores)
        notes = [f"{missing:,} of {len(readings):,} questions have no answer: not counted"] if missing else []
        ocr = _share_with_ocr([answer.prompt for answer in answers if answer is not None])
        words: dict[bool | str, str] = {True: "prompts hold OCR tokens", False: "prompts hold no OCR tokens"}
        notes.append(words.get(ocr, f"of the prompts, {ocr} hold OCR tokens: figures of such a mixture compare with none"))
        metrics = {"accuracy": 100 * mean, "samples": len(scores)} if self.protocol == "mobilevlm" else {"exact_match": mean}
        return Score(100 * mean, "percent", metrics, readings, tuple(notes), settings={"ocr_tokens": ocr})


def _rows(path: Path) -> dict[_Key, _Row]:
    rows: dict[_Key, _Row] = {}
    for entry in entry_of(read_json(path), str(path)).entries("data"):
        row = _Row(entry.text("question"), entry.text("image_id"), entry.whole("question_id"), entry.texts("answers"))
        if len(row.answers) != _PEOPLE:
            raise DataError(f"{entry.where}: {len(row.answers)} answers, expected {_PEOPLE}; download the official file again")
        if row.key in rows:
            raise DataError(f"{entry.where}: the question {row.question!r:.80} about picture {row.image_id!r:.80} stands twice")
        rows[row.key] = row
    if not rows:
        raise DataError(f"{path}: 'data' is empty; download it again")
    return rows


def _tokens(path: Path, rows: Mapping[_Key, _Row]) -> dict[str, tuple[str, ...]]:
    entries = entry_of(read_json(path), str(path)).entries("data")
    tokens = {entry.text("image_id"): entry.texts("ocr_tokens") for entry in entries}
    if missing := [row.image_id for row in rows.values() if row.image_id not in tokens]:
        raise DataError(
            f"{path} lacks {len(set(missing)):,} pictures of {OFFICIAL} (the first: {missing[0]!r:.80}); get both again"
        )
    return tokens


def _text(row: _Row, tokens: Mapping[str, Sequence[str]] | None) -> str:
    ocr = "" if tokens is None else f"\n{_OCR_LINE}{', '.join(tokens[row.image_id])}"
    return row.question.capitalize() + ocr + SHORT_ANSWER


def _question(row: _Row, text: str) -> Question:
    return Question(row.image_id, text, text, (f"train_images/{row.image_id}.jpg",), row.answers)


def _checked_texts(path: Path, rows: Mapping[_Key, _Row]) -> list[tuple[_Row, str]]:
    """The official rows and the texts of a question file, in its order.

    Raises:
        DataError: it does not ask what the official file holds.
    """
    found: dict[_Key, str] = {}
    for line in read_questions(path):
        key = line.question_id, line.text.split("\n")[0].lower()
        if key not in rows or key in found:
            what = "the question of another line" if key in found else "not in the official file"
            raise DataError(f"{line.where}: {key[1]!r:.80} about picture {key[0]!r:.80} is {what}; get both from their sources")
        if line.image != f"{line.question_id}.jpg":
            raise differs(line, "its image", line.image, f"{line.question_id}.jpg")
        found[key] = line.text
    if missing := [key for key in rows if key not in found]:
        raise DataError(
            f"{path} lacks {len(missing):,} of the {len(rows):,} official questions (the first: {missing[0][1]!r:.80} about"
            f" picture {missing[0][0]!r:.80}); get it again, or remove it: questions are built without it"
        )
    return [(rows[key], text) for key, text in found.items()]


def _key_of(question: Question) -> _Key:
    return str(question.question_id), question.prompt.split("\n")[0].lower()


def _asked_in(answer: Answer) -> str:
    """The question of a recorded prompt, in lower case.

    Raises:
        DataError: it is not in one of the forms that LLaVA's loaders write.
    """
    lines = answer.prompt.split("\n")
    if len(lines) == 3 and _OCR_LINE in answer.prompt:
        return lines[1 if lines[0].startswith(_OCR_LINE.rstrip()) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise DataError(
        f"line {answer.line} of the answer file: its 'prompt' has {len(lines)} lines; expected the question, then"
        f" {_OCR_LINE.strip()!r} and its tokens (or no such line), then the instruction: record prompts as LLaVA's loaders do"
    )


def _share_with_ocr(prompts: Sequence[str]) -> bool | str:
    """Whether all prompts hold OCR tokens, or none; else how many in words."""
    count = sum(_OCR_LINE in prompt for prompt in prompts)
    return f"{count:,} of {len(prompts):,}" if 0 < count < len(prompts) else count > 0


def _reading(question: Question, answer: Answer | None, given: Counter[str]) -> Reading:
    if answer is None:
        return Reading(question, None, "", 0.0, counted=False)
    parsed = m4c_text(answer.text)
    return Reading(question, answer.text, parsed, agreement(given[parsed], len(question.answers)))

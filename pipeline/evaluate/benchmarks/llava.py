"""A question file of the user's own, in LLaVA's format: the last answer of each conversation is what is right."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from alignkd.errors import DataError
from alignkd.inputs.prompts import IMAGE_TAG
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.evaluate.benchmarks.contract import About, Answer, Benchmark, Question, Reading, Score
from alignkd.pipeline.evaluate.benchmarks.shared.matching import by_id
from alignkd.pipeline.evaluate.metrics import METRICS, get_metric, is_empty

FILES = ("questions.json", "questions.jsonl")
"""The data file in the benchmark's folder; pictures lie beside it."""
MAX_NEW_TOKENS = 32


class LlavaQuestions(Benchmark):
    """Conversations about pictures, each with the answer that is expected.

    ``rejected``: id (or key) of each record that cannot be used, and why; such records are not among the questions.
    """

    about = About(
        name="llava",
        title="LLaVA questions",
        source="your own data, in the format of docs/data.md",
        licence="that of your data",
        figure="accuracy, %",
    )
    metric: str
    rejected: tuple[tuple[str, str], ...]
    _max_new_tokens: int

    @classmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """As :meth:`Benchmark.open`: ``questions.json`` or ``questions.jsonl``; every record must be usable."""
        data = next((folder / name for name in FILES if (folder / name).exists()), None)
        if data is None:
            raise DataError(
                f"{folder} lacks {' or '.join(FILES)} of {cls.about.title}: {cls.about.source} (licence:"
                f" {cls.about.licence}); lay it out as docs/benchmarks.md shows"
            )
        benchmark = cls.of(data, folder, protocol=protocol)
        if benchmark.rejected:
            name, reason = benchmark.rejected[0]
            raise DataError(f"{data}: {len(benchmark.rejected):,} records cannot be used; the first, {name!r:.80}: {reason}")
        return benchmark

    @classmethod
    def of(
        cls,
        data: Path,
        images: Path,
        metric: str = "exact",
        max_new_tokens: int = MAX_NEW_TOKENS,
        protocol: str = "mobilevlm",
    ) -> Self:
        """The questions of a data file, with pictures relative to a folder.

        Raises:
            ConfigError: the metric is unknown.
            DataError: the file cannot be read, or none of its records can be used.
        """
        get_metric(metric)
        file = SampleFile(data)
        questions, rejected = list[Question](), list[tuple[str, str]]()
        for number in range(len(file)):
            sample = file[number]
            if reason := _fault(sample):
                rejected.append((sample.id or sample.key, reason))
            else:
                questions.append(_question(sample))
        if not questions:
            raise DataError(
                f"data file {data}: none of its records can be used; the first, {rejected[0][0]!r}: {rejected[0][1]}"
            )
        benchmark = cls(images, protocol, questions)
        benchmark.metric, benchmark.rejected, benchmark._max_new_tokens = metric, tuple(rejected), max_new_tokens
        return benchmark

    @property
    def max_new_tokens(self) -> int:
        """As :attr:`Benchmark.max_new_tokens`."""
        return self._max_new_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """How answers are compared."""
        return {"metric": self.metric}

    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """By id, which is a text; questions may lack an answer."""
        ids = [question.question_id for question in self.questions]
        if len(set(ids)) < len(ids) or "" in ids:
            raise DataError(
                "the ids of the questions are missing or not unique: an answer file says nothing of which it answers"
            )
        return by_id(self.about, self.questions, answers)

    def score(self, answers: Sequence[Answer | None]) -> Score:
        """The share of right answers among those given, by the metric; ``metrics`` holds all that are registered."""
        readings = tuple(self._reading(q, answer) for q, answer in zip(self.questions, answers, strict=True))
        pairs = [(answer.text, q.answers[0]) for q, answer in zip(self.questions, answers, strict=True) if answer is not None]
        if not pairs:
            raise DataError(f"none of the {len(self.questions):,} questions is answered; answer them")
        metrics: dict[str, Any] = {
            name: 100 * sum(bool(compare(text, expected)) for text, expected in pairs) / len(pairs)
            for name, compare in METRICS.items()
        }
        right, missing = sum(reading.score for reading in readings), len(readings) - len(pairs)
        notes = (f"{missing:,} of {len(readings):,} questions have no answer: not counted",) if missing else ()
        metrics |= {"correct": int(right), "answered": len(pairs)}
        return Score(100 * right / len(pairs), "percent", metrics, readings, notes)

    def _reading(self, question: Question, answer: Answer | None) -> Reading:
        if answer is None:
            return Reading(question, None, "", 0.0, counted=False)
        right = get_metric(self.metric)(answer.text, question.answers[0])
        return Reading(question, answer.text, answer.text, float(right))


def _fault(sample: Sample) -> str:
    """Why a sample is no question; empty where it is one."""
    if sample.fault:
        return sample.fault
    speaker, reference = sample.turns[-1]
    if speaker != "gpt" or len(sample.turns) < 2:
        return "its last turn is not the answer to a question"
    if is_empty(reference):
        return f"its last answer is {reference!r}: there is nothing to compare a prediction with"
    return ""


def _question(sample: Sample) -> Question:
    *conversation, (_, reference) = sample.turns
    asked = next((text for speaker, text in reversed(conversation) if speaker == "human"), "")
    return Question(
        question_id=sample.id,
        text=asked.replace(IMAGE_TAG, "").strip(),
        prompt=asked,
        images=sample.images,
        answers=(reference,),
        conversation=tuple(conversation),
    )

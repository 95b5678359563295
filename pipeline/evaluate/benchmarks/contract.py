"""The contract of a benchmark: the questions that its official files hold, and what answers to them are worth.

1. :meth:`Benchmark.open` reads the official files of one folder. 2. :attr:`Benchmark.questions` are put to a model, in this
order, by the runner; each answer is one line of LLaVA's answer format (:class:`Answer`). 3. :meth:`Benchmark.match` finds the
line that answers each question, by the benchmark's own rule. 4. :meth:`Benchmark.score` says what they are worth.

An answer file that another tool wrote takes steps 1, 3 and 4 alone: neither model nor torch nor pictures are needed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from alignkd.pipeline.config import benchmark as config
from alignkd.pipeline.evaluate.benchmarks.pictures import missing_pictures, read_picture

PROTOCOLS = config.PROTOCOLS

ImageTreatment = Literal["pad", "crop", "pad-own-mode"]
"""What MobileVLM's loaders do to a picture before CLIP's resize and centre crop: lay it on a square of the mean colour in RGB;
nothing at all, in the mode that the file has; lay it on a square in its own mode. Other families have one treatment."""


@dataclass(frozen=True)
class About:
    """What users are told of a benchmark: its names, where its files come from, and under which licence."""

    name: str
    """On the command line, and its folder below ``--root``."""
    title: str
    source: str
    """Where a user downloads the official files."""
    licence: str
    figure: str
    """What papers print, in words: ``accuracy, %``."""


@dataclass(frozen=True)
class Question:
    """One question, as it is put to a model.

    ``question_id``: as answer files have it; where several questions are about one picture it need not be unique. ``text``:
    all that the user says, without a marker for the picture. ``images``: names that :meth:`Benchmark.read_image` knows.
    ``prompt``: what reference answer files record as the prompt. ``extra``: further fields of its line there.
    ``answers``: what is right, for people to read. ``category``: what scores are broken down by. ``conversation``: where
    ``text`` is not all, the turns up to the answer, with their markers.
    """

    question_id: str | int
    text: str
    prompt: str
    images: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    category: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    conversation: tuple[tuple[str, str], ...] = ()

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """The conversation, with an answer that is still empty; pictures come first."""
        asked = self.conversation or (("human", "<image>\n" * len(self.images) + self.text),)
        return (*asked, ("gpt", ""))


@dataclass(frozen=True)
class Answer:
    """One line of an answer file: LLaVA's ``question_id``, ``prompt`` and ``text``; ``line`` counts from 1."""

    question_id: str | int
    prompt: str
    text: str
    line: int


@dataclass(frozen=True)
class Reading:
    """One answer as the scorer understood it: ``parsed`` is what it read, ``score`` from 0 to 1 what that is worth.

    ``prediction`` is None where nobody answered. ``counted``: whether it enters the score that papers print.
    """

    question: Question
    prediction: str | None
    parsed: str
    score: float
    counted: bool = True


@dataclass(frozen=True)
class Score:
    """What answers are worth.

    ``score``: the figure that papers print, in ``unit``. ``metrics``: all others by name, nested where they are by category.
    ``readings``: one for each question, in order. ``notes``: what a reader must know, such as a presumed aggregation.
    ``settings``: what the answers themselves show of how they were made; they replace those of the benchmark.
    """

    score: float
    unit: Literal["percent", "points"]
    metrics: Mapping[str, Any]
    readings: tuple[Reading, ...]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(ABC):
    """The questions of one benchmark under one protocol. Implementations are listed in :mod:`.registry`."""

    about: ClassVar[About]

    def __init__(self, folder: Path, protocol: str, questions: Sequence[Question], notes: Sequence[str] = ()) -> None:
        assert protocol in PROTOCOLS
        self.folder, self.protocol = folder, protocol
        self.questions = tuple(questions)
        self._whole = len(self.questions)
        self.notes = tuple(notes)
        """What the files alone say of the result: OCR tokens or not, which version of the data."""

    @classmethod
    @abstractmethod
    def open(cls, folder: Path, protocol: str = "mobilevlm") -> Self:
        """Read the official files in the benchmark's own folder.

        Raises:
            DataError: files are missing (all of them are named, with where to get them and their licence), are not those of
                this benchmark, or contradict each other.
        """

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """The most tokens of an answer, under the protocol."""

    @property
    def image_treatment(self) -> ImageTreatment:
        """What MobileVLM's loader for this benchmark does to a picture."""
        return "pad"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What else decides the score and is written beside it: the version of the data, whether prompts have OCR tokens."""
        return {}

    def read_image(self, reference: str) -> bytes:
        """The bytes of a picture's file.

        Raises:
            DataError: it is missing, or lies outside of the benchmark's folder.
        """
        return read_picture(self.folder, reference)

    def missing_images(self) -> list[str]:
        """References of pictures that are not there, each once; nothing is decoded."""
        return missing_pictures(self.folder, (reference for question in self.questions for reference in question.images))

    @property
    def sampled(self) -> bool:
        """Whether these are some of the questions alone (:meth:`only`), so that no official scorer would be given them."""
        return len(self.questions) < self._whole

    def units(self) -> list[tuple[int, ...]]:
        """Indices of questions that only count together, such as the two about a picture of MME; every index is in one."""
        return [(index,) for index in range(len(self.questions))]

    def only(self, indices: Sequence[int]) -> Self:
        """The same benchmark with some of its questions, in the order of the file; whole :meth:`units` alone."""
        kept = sorted(indices)
        assert set(kept) == {i for unit in self.units() if unit[0] in set(kept) for i in unit}
        other = object.__new__(type(self))
        other.__dict__ = {**self.__dict__, "questions": tuple(self.questions[i] for i in kept)}
        return other

    @abstractmethod
    def match(self, answers: Sequence[Answer]) -> list[Answer | None]:
        """The line that answers each question, in the order of :attr:`questions`; None where a question may lack one.

        Raises:
            DataError: lines do not belong to these questions, or questions that must be answered are not.
        """

    @abstractmethod
    def score(self, answers: Sequence[Answer | None]) -> Score:
        """What matched answers are worth, one for each question, under the protocol.

        Raises:
            DataError: there is no score: nothing to divide by, or half of a pair is missing.
        """

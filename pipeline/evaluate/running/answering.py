"""The answers of a loaded model to a benchmark's questions, batch by batch."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignkd.errors import DataError, SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.models.encoders.templates.chat_template import check_date
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.benchmark import BATCH_TOKENS
from alignkd.pipeline.config.shared import DEFAULT_MAX_LENGTH
from alignkd.pipeline.evaluate.benchmarks.contract import Answer, Benchmark, Score
from alignkd.pipeline.evaluate.running.batches import Ask, Batches
from alignkd.pipeline.evaluate.running.generation import undisturbed
from alignkd.pipeline.evaluate.running.pictures import Pictures, with_treatment
from alignkd.pipeline.evaluate.running.schedule import (
    WINDOW,
    WINDOW_OF_PIXELS,
    groups_by_picture,
    windows,
)

_END = "</s>"
_READERS = 4
_NOTHING = torch.zeros(0)


@dataclass(frozen=True)
class RunSettings:
    """How questions are put: ``template`` None: the model's own; ``batch_tokens``: positions of a batch; ``prompt_date``: for
    a chat template that writes a date."""

    template: str | None = None
    batch_tokens: int = BATCH_TOKENS
    prompt_date: str | None = None


@dataclass(frozen=True)
class Answered:
    """The text that answers question ``index``, and its share of the seconds of its batch."""

    index: int
    text: str
    seconds: float


def run_benchmark(vlm: Vlm, benchmark: Benchmark, settings: RunSettings | None = None) -> Score:
    """Answer and score all questions of a benchmark in this process, with a model that may be in training.

    Its modes (training or evaluation) and torch's random numbers are left as they were; nothing is written.

    Raises:
        DataError: a picture or a question cannot be used, or the answers have no score.
        TransientError: memory does not suffice for one question.
    """
    texts = dict[int, str]()
    answering = Answering(vlm, benchmark, settings or RunSettings())
    for batch in answering(range(len(benchmark.questions))):
        texts |= {answered.index: answered.text for answered in batch}
    return benchmark.score(as_answers(benchmark, texts))


def as_answers(benchmark: Benchmark, texts: dict[int, str]) -> list[Answer | None]:
    """The lines that texts become in an answer file, matched with the questions by the benchmark's own rule."""
    asked = enumerate(benchmark.questions)
    return benchmark.match([Answer(q.question_id, q.prompt, texts[index], index + 1) for index, q in asked])


class Answering:
    """A model and a benchmark: call it with indices of questions for their answers."""

    def __init__(self, vlm: Vlm, benchmark: Benchmark, settings: RunSettings) -> None:
        self.vlm, self.benchmark, self.settings = vlm, benchmark, settings
        self.template = settings.template or vlm.default_template
        encoder, self.image_treatment = with_treatment(
            vlm.encoder(self.template, DEFAULT_MAX_LENGTH), benchmark.image_treatment
        )
        encoder.with_spans = False
        if settings.prompt_date and encoder.prompt_date:
            encoder.prompt_date = check_date(settings.prompt_date)
        self.encoder = encoder
        self.pictures = Pictures(vlm, encoder, benchmark)

    def __call__(self, indices: Sequence[int]) -> Iterator[list[Answered]]:
        """Answers batch by batch, not in the order of the questions; the model is in evaluation mode during each batch alone.

        Raises:
            DataError: a picture or a question cannot be used.
            TransientError: memory does not suffice for one question.
        """
        size = WINDOW if self.vlm.caches_tower else WINDOW_OF_PIXELS
        ahead = windows(groups_by_picture(self.benchmark.questions, indices), *size)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="pictures") as pool:
            try:
                window, asked = self._ask(pool, next(ahead, []))
                while window:
                    started = time.perf_counter()
                    with undisturbed(self.vlm):
                        images = self.pictures.ready(asked)
                    following = self._ask(pool, next(ahead, []))
                    for indices, ask in self._batches(window, images):
                        with undisturbed(self.vlm):
                            texts = ask()
                        each = (time.perf_counter() - started) / len(indices)
                        yield [Answered(index, cleaned(text), each) for index, text in zip(indices, texts, strict=True)]
                        started = time.perf_counter()
                    window, asked = following
            finally:
                pool.shutdown(cancel_futures=True)

    def question(self, index: int, images: Sequence[Any], known: dict[Any, ModelInput] | None = None) -> ModelInput:
        """A question as the model takes it.

        ``known``: prompts about one picture, by what their ids depend on: the turns, and the size of the picture.

        Raises:
            DataError: its prompt cannot be made.
        """
        question = self.benchmark.questions[index]
        shared = self.vlm.caches_tower and len(images) == 1  # questions about one picture share its features, uncopied
        known = {} if known is None else known
        prompt = (tuple(question.turns), images[0].size) if shared else None
        if prompt in known:
            return replace(known[prompt], images=images[0].values[None])
        try:
            made = self.encoder.question(question.turns, [replace(images[0], values=_NOTHING)] if shared else images)
        except SampleError as error:
            raise DataError(
                f"question {question.question_id!r} of {self.benchmark.about.title} cannot be put to this model: {error}; try"
                " another --template"
            ) from error
        if not shared:
            return made
        known[prompt] = made
        return replace(made, images=images[0].values[None])

    def _ask(self, pool: ThreadPoolExecutor, window: list[int]) -> tuple[list[int], Any]:
        questions = [self.benchmark.questions[index] for index in window]
        return window, self.pictures.ask(pool, list(dict.fromkeys(name for q in questions for name in q.images)))

    def _batches(self, window: Sequence[int], images: dict[str, Any]) -> Iterator[tuple[list[int], Ask]]:
        """Indices of each batch, and what answers it."""
        questions, known = self.benchmark.questions, dict[Any, ModelInput]()
        made = {index: self.question(index, [images[name] for name in questions[index].images], known) for index in window}
        return Batches(self.vlm, self.benchmark.max_new_tokens, self.settings.batch_tokens)(made)


def cleaned(text: str) -> str:
    """An answer as MobileVLM's loaders record it; special tokens are gone already."""
    return text.strip().removesuffix(_END).strip()

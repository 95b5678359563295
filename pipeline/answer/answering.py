"""A loaded model's answers to the questions of a window, batch by batch.

The batches of a window depend on the window alone, not on what is answered already, so that a run that goes on computes what
the first one would have.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from alignkd.errors import SampleError
from alignkd.inputs.prompts import IGNORE
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.answer import AnswerConfig
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.evaluate.decoding import Decoding
from alignkd.pipeline.evaluate.drawing import uniform_numbers
from alignkd.pipeline.evaluate.running.generation import halving
from alignkd.pipeline.evaluate.running.prefix import ids_sharing
from alignkd.pipeline.evaluate.running.questions import Asked
from alignkd.pipeline.evaluate.running.schedule import like_length_batches


@dataclass(frozen=True)
class Unit:
    """Answer ``number``, from 0, to a question."""

    question: Asked
    number: int


@dataclass(frozen=True)
class Answer:
    """What a model wrote. ``tokens``: how many, with the end token. ``finished``: it ended by itself.

    ``same_tokens``: whether a student that is trained on the text learns exactly these tokens. ``fault``: why the sample with
    this answer cannot be used; empty where it can.
    """

    index: int
    key: str
    number: int
    text: str
    tokens: int
    finished: bool
    same_tokens: bool
    fault: str = ""


class Answering:
    """A model and the settings of its answers."""

    def __init__(self, vlm: Vlm, preparer: Preparer, config: AnswerConfig) -> None:
        self.vlm, self.preparer, self.config = vlm, preparer, config
        self.decoding = Decoding(config.max_new_tokens, config.temperature, config.top_p)
        self.ends = frozenset(vlm.end_token_ids)

    def batches(self, questions: Sequence[Asked]) -> list[list[Unit]]:
        """The answers to be written, in batches of questions of like length, the longest first."""
        units = [Unit(question, number) for question in questions for number in range(self.config.n)]
        lengths = [self._length(unit.question.input.input_ids) for unit in units]
        batches = like_length_batches(lengths, self.config.max_new_tokens, self.config.batch_tokens)
        return [[units[place] for place in batch] for batch in batches]

    def __call__(self, batch: Sequence[Unit]) -> list[Answer]:
        """The answers of a batch; one for which memory does not suffice is halved.

        Raises:
            TransientError: memory does not suffice for one question.
        """
        ids = halving(self._ids, batch)
        return [self._answer(unit, found) for unit, found in zip(batch, ids, strict=True)]

    def _ids(self, units: Sequence[Unit]) -> list[list[int]]:
        uniforms_BN = None
        if self.config.temperature:
            seed, count = self.config.seed, self.config.max_new_tokens
            uniforms_BN = np.stack([uniform_numbers(seed, unit.question.sample.key, unit.number, count) for unit in units])
        return ids_sharing(self.vlm, [unit.question.input for unit in units], self.decoding, uniforms_BN)

    def _answer(self, unit: Unit, ids: list[int]) -> Answer:
        question, text = unit.question, self.vlm.answer_text(ids)
        finished = bool(ids) and ids[-1] in self.ends
        same, fault = False, ""
        if text:
            try:
                same = self._learns(question, text, ids[:-1] if finished else ids)
            except SampleError as error:
                fault = str(error)
        return Answer(question.index, question.sample.key, unit.number, text, len(ids), finished, same, fault)

    def _learns(self, question: Asked, text: str, ids: list[int]) -> bool:
        """Whether the sample with this answer supervises these ids and one end token, and nothing else, in its last turn.

        Raises:
            SampleError: the sample with this answer cannot be used.
        """
        encoder, turns = self.preparer.encoder, (*question.asked, ("gpt", text))
        planned = None if encoder.needs_sizes else encoder.plan(turns, len(question.images))
        if planned is not None and planned.encoded is not None:
            labels = planned.encoded.labels
        else:
            labels = encoder.encode(turns, question.images)[0].labels
        *learned, end = last_supervised(labels) or [IGNORE]
        return learned == ids and end in self.ends

    def _length(self, ids: np.ndarray) -> int:
        return len(ids) + int((ids == self.vlm.image_token_id).sum()) * (self.vlm.tokens_per_placeholder - 1)


def last_supervised(labels: np.ndarray) -> list[int]:
    """The last stretch of labels that are supervised."""
    (places,) = np.nonzero(labels != IGNORE)
    if not len(places):
        return []
    breaks = np.flatnonzero(np.diff(places) > 1)
    found: list[int] = labels[places[breaks[-1] + 1 if len(breaks) else 0 :]].tolist()
    return found

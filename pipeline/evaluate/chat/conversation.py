"""A conversation about pictures: each question continues it, and its prompt is the one that ``evaluate`` makes of its turns."""

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError, SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.prompts import IMAGE_TAG, PromptError
from alignkd.models.encoders.image_files import open_image, read_image_bytes
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.preparer import Preparer
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.tower_features import tower_features
from alignkd.pipeline.evaluate.chat.stream import AnswerStreamer
from alignkd.pipeline.evaluate.decoding import Decoding, generate_ids

ANEW = "/new"
"""The question that begins another conversation about the same pictures."""
_CONTINUE = f"the question {ANEW} begins another conversation about the same pictures"


@dataclass(frozen=True)
class Answered:
    """One question and its answer: its number of tokens, the one that ends it included, and the seconds that it took.

    ``stopped``: the user stopped it. ``cut``: it has as many tokens as it may have, and no end.
    """

    question: str
    answer: str
    tokens: int
    seconds: float
    stopped: bool
    cut: bool

    @property
    def figures(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"question": self.question, "answer": self.answer, "tokens": self.tokens, "seconds": round(self.seconds, 3)}


def check_pictures(files: Sequence[str]) -> None:
    """Refuse files that are missing or no pictures, before a model is loaded.

    Raises:
        ConfigError: one is a folder.
        ImageError: one cannot be read; it is named.
    """
    for name in files:
        if Path(name).is_dir():
            raise ConfigError(f"--image {name} is a folder; give the file of a picture")
        open_image(io.BytesIO(read_image_bytes(Path(name))), name)


@dataclass
class Conversation:
    """Questions and answers so far about ``images``, by absolute path. ``limit``: positions that it may take, None for any.

    ``system``: the text of a system turn before them, "" for none.
    """

    vlm: Vlm
    preparer: Preparer
    images: tuple[str, ...]
    decoding: Decoding
    limit: int | None
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def about(
        cls,
        vlm: Vlm,
        files: Sequence[str],
        decoding: Decoding,
        *,
        template: str,
        max_length: int | None = None,
        prompt_date: str | None = None,
        system: str = "",
    ) -> "Conversation":
        """One that begins with some pictures: they are read, and the frozen tower runs, once.

        Raises:
            SampleError: a picture cannot be read.
            ConfigError: the model does not know the template.
        """
        images = tuple(str(Path(name).absolute()) for name in files)
        own = getattr(vlm.text_config, "max_position_embeddings", None)
        limits = [number for number in (own, max_length) if isinstance(number, int) and number > 0]
        limit = min(limits, default=None)
        preparer = Preparer.of(vlm, template=template, max_length=limit or 2**20, image_root="/", prompt_date=prompt_date)
        loaded = {reference: preparer.load_images((reference,)) for reference in images}
        preparer.features = {reference: (digest, values[0]) for reference, (values, digest) in loaded.items()}
        if vlm.caches_tower and images:
            preparer.features = dict(tower_features(vlm, preparer, list(dict.fromkeys(images))))
        return cls(vlm, preparer, images, decoding, limit, system)

    def ask(self, question: str, write: Callable[[str], None], *, may_stop: bool = False) -> Answered:
        """The answer to a question, which becomes part of the conversation; ``write`` gets its text piece by piece.

        ``may_stop``: an interrupt (SIGINT) ends the answer, and what was written of it is kept.

        Raises:
            SampleError: the question cannot be asked; the conversation stays as it was.
        """
        start = time.monotonic()
        turns, given, room = self.prompt(question)
        streamer = AnswerStreamer(self.vlm.answer_text, write)
        most = self.decoding.max_new_tokens if room is None else min(self.decoding.max_new_tokens, room)
        stopped = False
        try:
            generate_ids(self.vlm, [given], replace(self.decoding, max_new_tokens=most), streamer)
        except KeyboardInterrupt:
            if not may_stop:
                raise
            stopped = True
        streamer.end()
        ids, answer = streamer.ids, streamer.text
        ended = bool(ids) and ids[-1] in self.vlm.end_token_ids
        if answer or not stopped:
            self.turns = [*turns, ("gpt", answer)]
        seconds = time.monotonic() - start
        return Answered(question, answer, len(ids), seconds, stopped, cut=len(ids) >= most and not ended)

    def prompt(self, question: str) -> tuple[list[tuple[str, str]], ModelInput, int | None]:
        """The turns with a question, the model's input, and for how many tokens of an answer there is room.

        Raises:
            SampleError: the question cannot be asked, and why.
        """
        check_question(question)
        tags = IMAGE_TAG in question or bool(self.turns)
        turns = [*self.turns, ("human", question if tags else f"{IMAGE_TAG}\n" * len(self.images) + question)]
        named = sum(text.count(IMAGE_TAG) for _, text in turns)
        if self.images and named != len(self.images):
            raise SampleError(
                f"the conversation names {named} pictures with {IMAGE_TAG}, and --image gives {len(self.images)}: leave"
                f" {IMAGE_TAG} out of the question{f', or: {_CONTINUE}' if self.turns else ''}"
            )
        sample = Sample("", self.images, (("system", self.system), *turns, ("gpt", "")), "")
        try:
            given = self.preparer.question(sample)
        except PromptError as error:
            raise SampleError(f"{error}; {_CONTINUE}" if self.turns else str(error)) from error
        if self.limit is None:
            return turns, given, None
        positions = len(self.vlm.collator.expand(given).input_ids)
        if positions >= self.limit:
            raise SampleError(
                f"with this question the conversation takes {positions:,} positions, which leaves no room for an answer:"
                f" {self.limit:,} are the most. Ask a shorter question, or go on without the earlier ones: {_CONTINUE}"
            )
        return turns, given, self.limit - positions

    def begin_anew(self) -> None:
        """Forget all questions and answers; the pictures stay."""
        self.turns = []


def check_question(question: str) -> None:
    """Refuse a question that holds nothing, or bytes that are no text.

    Raises:
        SampleError: says which.
    """
    if not question.strip():
        raise SampleError("the question is empty; expected a text")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"the question is not UTF-8, from its character {error.start + 1} on; expected UTF-8 text") from error

"""Prompts that are tokenised segment by segment, with images between: BLIP-2 and the families after it.

1. A family gives a conversation as segments: text, an image, or single ids.
2. Each text is tokenised separately, without special tokens, so no segment depends on its neighbours.
3. A segment is supervised (an answer, and what ends it) or not, so labels need no counting.

Shapes: L ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from alignkd.inputs.batch import ModelInput
from alignkd.inputs.encoder import Planned
from alignkd.inputs.prompts import IGNORE, IMAGE_TAG, Encoded, Part, PromptError, Turns, refuse_system, split_system
from alignkd.inputs.regions import region_without_coordinates, stack
from alignkd.inputs.spans import NO_SPANS, places
from alignkd.models.encoders.templates.special_tokens import structure_tokens
from alignkd.models.encoders.text_offsets import tokenise

_TAG_AS_TEXT = "\ufdd2"
"""Stands for an image tag that is text while a family makes segments; no Unicode text holds it."""


@dataclass(frozen=True)
class Segment:
    """What is tokenised separately: ``parts`` of text, or ready ``ids``; ``supervised``: its ids are labels, too."""

    parts: tuple[Part, ...] = ()
    ids: tuple[int, ...] = ()
    supervised: bool = False

    @property
    def text(self) -> str:
        """Its parts, joined."""
        return "".join(text for text, _ in self.parts)


@dataclass
class SegmentEncoder(ABC):
    """An :class:`alignkd.inputs.encoder.Encoder` of pixel values ``[3, h, w]``; ``images`` makes them from an image.

    A family subclasses it and says which segments a conversation has. ``vision_tokens``: of one image; ``max_length`` counts
    ids of text. Vision tokens come from queries that read the whole image, so they have no coordinates.
    """

    tokenizer: Any
    images: Any
    template: str
    max_length: int
    image_token_id: int
    vision_tokens: int
    needs_sizes = False
    prompt_date = ""
    with_spans = True
    marks: ClassVar[tuple[str, ...]] = ()
    """What the model does not read as text, in addition to the special tokens."""
    takes_system: ClassVar[bool] = False
    """Whether :meth:`segments` has a place for a system turn before all other turns."""

    @property
    @abstractmethod
    def image(self) -> Segment:
        """The ids that stand for an image."""

    @abstractmethod
    def segments(self, turns: Turns, images: int) -> list[Segment]:
        """A conversation in segments; without its last answer it ends where that answer begins."""

    def image_inputs(self, turns: Turns, images: int) -> Mapping[str, torch.Tensor]:
        """What its model needs of each image in addition to the pixel values."""
        return {}

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """Ids, labels and spans; all images have the same number of vision tokens."""
        made, spans = self._encode(turns, images)
        vision = int((made.input_ids == self.image_token_id).sum())
        if vision != images * len(self.image.ids):
            raise PromptError(f"an image lies beyond the maximum length of {self.max_length} ids")
        if not (made.labels[1:] != IGNORE).any():
            where = f" within {self.max_length} ids" if made.truncated else ""
            raise PromptError(f"no supervised token{where}: the answer is empty or cut off")
        return Planned(len(made.input_ids) - vision + images * self.vision_tokens, made, spans)

    def encode(self, turns: Turns, images: Sequence[torch.Tensor]) -> tuple[ModelInput, bool]:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        return self.finish(turns, self.plan(turns, len(images)), images)

    def decode(self, image: Image.Image) -> Image.Image:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        decoded: Image.Image = self.images.decode(image)
        return decoded

    def load(self, image: Image.Image) -> torch.Tensor:
        """Its pixel values."""
        pixels: torch.Tensor = self.images(image)
        return pixels

    def finish(self, turns: Turns, planned: Planned, images: Sequence[torch.Tensor]) -> tuple[ModelInput, bool]:
        """The planned ids with the images."""
        made = planned.encoded
        assert made is not None, "made by plan"
        return self._input(made.input_ids, made.labels, planned.spans, self._usable(turns), images), made.truncated

    def question(self, turns: Turns, images: Sequence[torch.Tensor]) -> ModelInput:
        """The prompt; its labels are all ignored."""
        if not turns or turns[-1][0] != "gpt":
            raise PromptError("the last turn must be the answer ('gpt') to compare with")
        turns = self._usable(turns)
        made, spans = self._encode(turns[:-1], len(images), whole=True)
        return self._input(made.input_ids, np.full_like(made.labels, IGNORE), spans, turns, images)

    def _encode(self, turns: Turns, images: int, *, whole: bool = False) -> tuple[Encoded, np.ndarray]:
        """Ids and labels, and the spans ``[L, 2]``; ``whole``: not cut at the maximum length."""
        turns = self._usable(turns)
        self._check(turns, images)
        segments = self.segments(turns, images) if images else self._without_images(turns)
        parts, before = [], 0
        for segment in segments:
            parts.append(self._tokenise(segment, before))
            before = int(places(segment.parts, before)[-1])
        ids, spans = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        supervised = np.repeat([segment.supervised for segment in segments], [len(ids) for ids, _ in parts])
        text = (ids != self.image_token_id).cumsum()
        length = len(ids) if whole else int(np.searchsorted(text, self.max_length, side="right"))
        spans = spans[:length] if len(spans) == len(ids) else NO_SPANS
        labels = np.where(supervised, ids, IGNORE)
        return Encoded(ids[:length], labels[:length], truncated=length < len(ids)), spans

    def _usable(self, turns: Turns) -> list[tuple[str, str]]:
        """The turns without system turns that say nothing."""
        if not self.takes_system:
            return refuse_system(turns, self.template)
        system, others = split_system(turns)
        return [("system", system), *others] if system else others

    def _without_images(self, turns: Turns) -> list[Segment]:
        """A conversation without images in segments: an image tag in its text is text, as in LLaVA's training code."""
        hidden = [(speaker, text.replace(IMAGE_TAG, _TAG_AS_TEXT)) for speaker, text in turns]
        return [
            replace(segment, parts=tuple((text.replace(_TAG_AS_TEXT, IMAGE_TAG), own) for text, own in segment.parts))
            for segment in self.segments(hidden, 0)
        ]

    def _tokenise(self, segment: Segment, before: int) -> tuple[np.ndarray, np.ndarray]:
        """Its ids and spans; ``before`` characters of the conversation precede it."""
        if segment.ids:
            return np.asarray(segment.ids, dtype=np.int64), np.full((len(segment.ids), 2), before, dtype=np.int32)
        ids, offsets = tokenise(self.tokenizer, segment.text)
        spans = NO_SPANS if offsets is None else places(segment.parts, before)[offsets[len(self.start) :]]
        return ids[len(self.start) :], spans

    @cached_property
    def start(self) -> tuple[int, ...]:
        """The ids that the tokenizer puts before a text."""
        return tuple(self.tokenizer("").input_ids)

    def _check(self, turns: Turns, images: int) -> None:
        named = sum(text.count(IMAGE_TAG) for _, text in turns)
        if images and named != images:
            raise PromptError(f"its text names {named} images, the sample has {images}")
        specials = {*structure_tokens(self.tokenizer), *self.marks} - {IMAGE_TAG}
        if not images and named and IMAGE_TAG in self.tokenizer.get_vocab():
            specials.add(IMAGE_TAG)
        first = int(bool(turns) and turns[0][0] == "system")
        for number, (speaker, text) in enumerate(turns):
            if number >= first and speaker != ("human", "gpt")[(number - first) % 2]:
                raise PromptError(f"turn {number} is from {speaker!r}; turns must alternate human, gpt")
            if number < first and images and IMAGE_TAG in text:
                raise PromptError("its system turn holds an image: images belong to questions")
            if _TAG_AS_TEXT in text:
                raise PromptError("its text holds U+FDD2, which is not a Unicode character")
            if found := next((token for token in specials if token in text), None):
                raise PromptError(f"its text holds the special token {found!r}, which the model would not read as text")

    def _input(
        self, ids: np.ndarray, labels: np.ndarray, spans: np.ndarray, turns: Turns, images: Sequence[torch.Tensor]
    ) -> ModelInput:
        count = len(images)
        return ModelInput(
            ids,
            labels,
            torch.stack(list(images)) if images else torch.zeros(0),
            image_inputs=self.image_inputs(turns, count) if count else {},
            regions_R8=stack([region_without_coordinates(i, self.vision_tokens) for i in range(count)]),
            spans=spans,
        )


def own_text(text: str) -> str:
    """A question without its image tags and the line breaks that come with them."""
    return text.replace(IMAGE_TAG, "").strip()


def own_answer(text: str) -> str:
    """An answer without image tags, its white space as it stands."""
    return text.replace(IMAGE_TAG, "")

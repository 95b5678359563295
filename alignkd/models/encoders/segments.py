"""Prompts that are tokenised piece by piece, images in between: the way of BLIP-2's relatives.

1. A family lays a conversation out as pieces: text, an image, an id of its own.
2. Each text is tokenised by itself, without special tokens, so no piece depends on its neighbours.
3. A piece is learned (an answer, and what ends it) or not: labels are known without counting.

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
from alignkd.inputs.prompts import IGNORE, IMAGE_TAG, Part, PromptError, Turns
from alignkd.inputs.regions import region_without_coordinates, stack
from alignkd.inputs.spans import NO_SPANS, places
from alignkd.models.encoders.text_offsets import text_offsets


@dataclass(frozen=True)
class Segment:
    """What is tokenised by itself: ``parts`` of text, or ``ids`` as they are; ``learned``: its ids are supervised."""

    parts: tuple[Part, ...] = ()
    ids: tuple[int, ...] = ()
    learned: bool = False

    @property
    def text(self) -> str:
        """Its parts, joined."""
        return "".join(text for text, _ in self.parts)


@dataclass(frozen=True)
class _Ids:
    """Ids and labels ``[L]`` of a conversation, its spans ``[L, 2]``, and whether text was cut off."""

    input_ids: np.ndarray
    labels: np.ndarray
    spans: np.ndarray
    truncated: bool


@dataclass
class SegmentEncoder(ABC):
    """An :class:`alignkd.inputs.encoder.Encoder` of pixel values ``[3, h, w]``; ``images`` makes them of a picture.

    A family subclasses it and says which pieces a conversation has. ``vision_tokens`` an image; ``max_length`` counts ids of
    text. Vision tokens come from queries that look everywhere, so none has a place.
    """

    tokenizer: Any
    images: Any
    template: str
    max_length: int
    image_token_id: int
    vision_tokens: int
    needs_sizes = False
    with_spans = True
    marks: ClassVar[tuple[str, ...]] = ()
    """What else than special tokens the model does not read as text."""

    @property
    @abstractmethod
    def image(self) -> Segment:
        """The ids that stand for an image."""

    @abstractmethod
    def pieces(self, turns: Turns, images: int) -> list[Segment]:
        """A conversation in pieces; without its last answer it ends where that begins."""

    def image_inputs(self, turns: Turns, images: int) -> Mapping[str, torch.Tensor]:
        """What its model wants of each image besides the pixel values."""
        return {}

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """The length; each image has as many vision tokens as any other."""
        made = self._encode(turns, images)
        vision = int((made.input_ids == self.image_token_id).sum())
        if vision != images * len(self.image.ids):
            raise PromptError(f"an image lies beyond the maximum length of {self.max_length} ids")
        if not (made.labels[1:] != IGNORE).any():
            where = f" within {self.max_length} ids" if made.truncated else ""
            raise PromptError(f"no supervised token{where}: the answer is empty or cut off")
        return Planned(len(made.input_ids) - vision + images * self.vision_tokens)

    def load(self, image: Image.Image) -> torch.Tensor:
        """Its pixel values."""
        pixels: torch.Tensor = self.images(image)
        return pixels

    def finish(self, turns: Turns, planned: Planned, images: Sequence[Any]) -> tuple[ModelInput, bool]:
        """Ids, labels and images."""
        made = self._encode(turns, len(images))
        return self._input(made, turns, images), made.truncated

    def question(self, turns: Turns, images: Sequence[Any]) -> ModelInput:
        """The prompt; its labels are all ignored."""
        if not turns or turns[-1][0] != "gpt":
            raise PromptError("the last turn must be the answer ('gpt') to compare with")
        made = self._encode(turns[:-1], len(images), whole=True)
        return self._input(replace(made, labels=np.full_like(made.labels, IGNORE)), turns, images)

    def _encode(self, turns: Turns, images: int, *, whole: bool = False) -> _Ids:
        self._check(turns, images)
        parts: list[_Ids] = []
        spelled = 0
        for piece in self.pieces(turns, images):
            parts.append(self._tokenise(piece, spelled))
            spelled = int(places(piece.parts, spelled)[-1])
        ids, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("input_ids", "labels"))
        spans = np.concatenate([part.spans for part in parts])
        text = (ids != self.image_token_id).cumsum()
        length = len(ids) if whole else int(np.searchsorted(text, self.max_length, side="right"))
        spans = spans[:length] if len(spans) == len(ids) else NO_SPANS
        return _Ids(ids[:length], labels[:length], spans, length < len(ids))

    def _tokenise(self, piece: Segment, spelled: int) -> _Ids:
        """``spelled`` characters of the conversation come before the piece."""
        if piece.ids:
            ids, spans = np.asarray(piece.ids, dtype=np.int64), np.full((len(piece.ids), 2), spelled, dtype=np.int32)
        else:
            encode = getattr(self.tokenizer, "encode_chunk", None)
            found = encode(piece.text) if encode is not None else self.tokenizer(piece.text).input_ids
            ids = np.asarray(found[len(self.start) :], dtype=np.int64)
            offsets = text_offsets(self.tokenizer, piece.text)
            spans = NO_SPANS if offsets is None else places(piece.parts, spelled)[offsets[len(self.start) :]]
        return _Ids(ids, ids if piece.learned else np.full_like(ids, IGNORE), spans, False)

    @cached_property
    def start(self) -> tuple[int, ...]:
        """What the tokenizer puts before a text."""
        return tuple(self.tokenizer("").input_ids)

    def _check(self, turns: Turns, images: int) -> None:
        named = sum(text.count(IMAGE_TAG) for _, text in turns)
        if named != images:
            raise PromptError(f"its text names {named} images, the sample has {images}")
        specials = {*map(str, self.tokenizer.all_special_tokens), *self.marks} - {IMAGE_TAG}
        for number, (speaker, text) in enumerate(turns):
            if speaker != ("human", "gpt")[number % 2]:
                raise PromptError(f"turn {number} is from {speaker!r}; turns must alternate human, gpt")
            if found := next((token for token in specials if token in text), None):
                raise PromptError(f"its text holds the special token {found!r}, which the model would not read as text")

    def _input(self, made: _Ids, turns: Turns, images: Sequence[torch.Tensor]) -> ModelInput:
        count = len(images)
        return ModelInput(
            made.input_ids,
            made.labels,
            torch.stack(list(images)) if images else torch.zeros(0),
            image_inputs=self.image_inputs(turns, count) if count else {},
            regions_R8=stack([region_without_coordinates(i, self.vision_tokens) for i in range(count)]),
            spans=made.spans,
        )


def own_text(text: str) -> str:
    """A turn's text without its image tags."""
    return text.replace(IMAGE_TAG, "").strip()

"""Text templates with one placeholder an image, which becomes a fixed number of vision tokens: as LLaVA and MobileVLM do.

Shapes: P patches, C tower width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image

from alignkd.inputs.batch import ModelInput
from alignkd.inputs.encoder import Planned
from alignkd.inputs.prompts import IGNORE, IMAGE_TAG, PromptError, Turns, encode_conversation, encode_question, parts_of
from alignkd.inputs.regions import region, square_box, stack
from alignkd.inputs.spans import NO_SPANS, counted, places
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.encoders.text_offsets import text_offsets


@dataclass(frozen=True)
class LoadedImage:
    """One image: pixel values ``[3, h, w]`` or tower features ``[P, C]``, and the (width, height) it had."""

    values: torch.Tensor
    size: tuple[int, int]


@dataclass
class PlaceholderEncoder:
    """An :class:`alignkd.inputs.encoder.Encoder` of :class:`LoadedImage` images."""

    tokenizer: Any
    images: ImagePreprocessor
    template: str
    max_length: int
    tokens_per_placeholder: int
    with_spans: bool = True
    needs_sizes = False
    prompt_date = ""

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """Ids, labels and spans; each image is one id until vision tokens replace it."""
        encoded = encode_conversation(
            turns, template=self.template, tokenizer=self.tokenizer, has_image=bool(images), max_length=self.max_length
        )
        if encoded.images != images:
            raise PromptError(f"an image lies beyond the maximum length of {self.max_length} ids")
        if not encoded.supervised:
            where = f" within {self.max_length} ids" if encoded.truncated else ""
            raise PromptError(f"no supervised token{where}: the answer is empty, cut off, or masked by the template")
        spans = self._spans(turns, bool(images))[: len(encoded.input_ids)]
        return Planned(len(encoded.input_ids) + images * (self.tokens_per_placeholder - 1), encoded, spans)

    def encode(self, turns: Turns, images: Sequence[LoadedImage]) -> tuple[ModelInput, bool]:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        return self.finish(turns, self.plan(turns, len(images)), images)

    def decode(self, image: Image.Image) -> Image.Image:
        """See :class:`alignkd.inputs.encoder.Encoder`."""
        return self.images.decode(image)

    def load(self, image: Image.Image) -> LoadedImage:
        """Its pixel values."""
        return LoadedImage(self.images(image), image.size)

    def finish(self, turns: Turns, planned: Planned, images: Sequence[LoadedImage]) -> tuple[ModelInput, bool]:
        """The planned ids with the images."""
        del turns
        encoded = planned.encoded
        assert encoded is not None, "made by plan"
        return self._input(encoded.input_ids, encoded.labels, images, planned.spans), encoded.truncated

    def question(self, turns: Turns, images: Sequence[LoadedImage]) -> ModelInput:
        """The prompt; its labels are all ignored."""
        ids = encode_question(turns, template=self.template, tokenizer=self.tokenizer, has_image=bool(images))
        return self._input(ids, ids * 0 + IGNORE, images)

    def _spans(self, turns: Turns, has_image: bool) -> np.ndarray:
        """Which of the conversation's characters each id stands for; none where the tokenizer cannot say."""
        if not self.with_spans:
            return NO_SPANS
        parts, left_out = parts_of(turns, template=self.template, has_image=has_image)
        before = sum(int(counted(text).sum()) for _, text in turns[:left_out])
        text, places_C = "".join(part for part, _ in parts), places(parts, before)
        spans, start = [], 0
        for number, chunk in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
            offsets = text_offsets(self.tokenizer, chunk)
            if offsets is None:
                return NO_SPANS
            if number:
                spans.append(np.full((1, 2), start - len(IMAGE_TAG)))
                offsets = offsets[self._starts :]
            spans.append(offsets + start)
            start += len(chunk) + len(IMAGE_TAG)
        found: np.ndarray = places_C[np.concatenate(spans)]
        return found

    @cached_property
    def _starts(self) -> int:
        """How many start tokens the tokenizer puts before a text."""
        ids = self.tokenizer("").input_ids
        return int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)

    def _input(
        self, ids: np.ndarray, labels: np.ndarray, images: Sequence[LoadedImage], spans: np.ndarray = NO_SPANS
    ) -> ModelInput:
        side = math.isqrt(self.tokens_per_placeholder)
        regions = [region(i, (side, side), square_box(image.size, self.images.square_mode)) for i, image in enumerate(images)]
        pixels = torch.stack([image.values for image in images]) if images else torch.zeros(0)
        return ModelInput(ids, labels, pixels, regions_R8=stack(regions), spans=spans)

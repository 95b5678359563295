"""Text templates with one placeholder an image, which becomes a fixed number of vision tokens: LLaVA's and MobileVLM's way."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from alignkd.batch import ModelInput
from alignkd.encoder import Planned
from alignkd.models.images import ImagePreprocessor
from alignkd.prompts import IGNORE, PromptError, Turns, encode_conversation, encode_question
from alignkd.regions import region, square_box, stack


@dataclass(frozen=True)
class Picture:
    """One image: pixel values ``[3, h, w]`` or tower features ``[P, C]``, and the (width, height) it had."""

    values: torch.Tensor
    size: tuple[int, int]


@dataclass
class PlaceholderEncoder:
    """An :class:`alignkd.encoder.Encoder` of :class:`Picture` images."""

    tokenizer: Any
    images: ImagePreprocessor
    template: str
    max_length: int
    tokens_per_placeholder: int
    needs_sizes = False

    def plan(self, turns: Turns, images: int, sizes: Sequence[tuple[int, int]] = ()) -> Planned:
        """Ids and labels; each image is one id until vision tokens take its place."""
        encoded = encode_conversation(
            turns, template=self.template, tokenizer=self.tokenizer, has_image=bool(images), max_length=self.max_length
        )
        if encoded.images != images:
            raise PromptError(f"an image lies beyond the maximum length of {self.max_length} ids")
        if not encoded.supervised:
            where = f" within {self.max_length} ids" if encoded.truncated else ""
            raise PromptError(f"no supervised token{where}: the answer is empty, cut off, or masked by the template")
        return Planned(len(encoded.input_ids) + images * (self.tokens_per_placeholder - 1), encoded)

    def load(self, image: Image.Image) -> Picture:
        """Its pixel values."""
        return Picture(self.images(image), image.size)

    def finish(self, turns: Turns, planned: Planned, images: Sequence[Any]) -> tuple[ModelInput, bool]:
        """The planned ids with the images."""
        encoded = planned.encoded
        assert encoded is not None
        return self._input(encoded.input_ids, encoded.labels, images), encoded.truncated

    def question(self, turns: Turns, images: Sequence[Any]) -> ModelInput:
        """The prompt; its labels are all ignored."""
        ids = encode_question(turns, template=self.template, tokenizer=self.tokenizer, has_image=bool(images))
        return self._input(ids, ids * 0 + IGNORE, images)

    def _input(self, ids: np.ndarray, labels: np.ndarray, images: Sequence[Picture]) -> ModelInput:
        side = math.isqrt(self.tokens_per_placeholder)
        regions = [region(i, (side, side), square_box(image.size, self.images.fit)) for i, image in enumerate(images)]
        pixels = torch.stack([image.values for image in images]) if images else torch.zeros(0)
        return ModelInput(ids, labels, pixels, regions_R8=stack(regions))

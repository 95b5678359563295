"""One sample to one model input: text to ids and labels, images to pixel values (or ready tower features).

What cannot be prepared is a :class:`SampleError`: the caller names it, counts it and stops when there are too many.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from alignkd.batch import ModelInput
from alignkd.models.images import ImageError, ImagePreprocessor, decode_image, read_image_bytes
from alignkd.models.vlm import Vlm
from alignkd.pipeline.samples import Sample
from alignkd.prompts import PromptError, encode_conversation

DEFAULT_MAX_LENGTH = 2048


class SampleError(ValueError):
    """This sample cannot be used; the message says why."""


@dataclass(frozen=True)
class PreparedText:
    """Compact ids and labels ``[length]`` of a sample; ``truncated`` where it was longer."""

    input_ids: np.ndarray
    labels: np.ndarray
    truncated: bool


@dataclass(frozen=True)
class Prepared:
    """A model input, and the SHA-256 of its images' files ("" without images)."""

    input: ModelInput
    image_sha256: str
    truncated: bool


@dataclass
class Preparer:
    """Everything that turns a sample into a model input; safe to send to worker processes."""

    tokenizer: Any
    images: ImagePreprocessor
    template: str
    max_length: int
    image_root: Path
    features: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)
    """Tower features by image reference, with the file's SHA-256; an image found here is not read again."""

    @classmethod
    def of(cls, vlm: Vlm, *, template: str, max_length: int, image_root: str | Path | None) -> "Preparer":
        """The preparer of a loaded model."""
        return cls(vlm.tokenizer, vlm.images, template, max_length, Path(image_root or "."))

    def __call__(self, sample: Sample) -> Prepared:
        """Prepare one sample.

        Raises:
            SampleError: an image cannot be read, or no answer token is left to learn from.
        """
        return self.with_images(sample, self.text(sample))

    def text(self, sample: Sample) -> PreparedText:
        """The first half: token ids and labels.

        Raises:
            SampleError: no answer token is left to learn from, or an image lies beyond the maximum length.
        """
        check_text(sample)
        try:
            encoded = encode_conversation(
                sample.turns,
                template=self.template,
                tokenizer=self.tokenizer,
                has_image=bool(sample.images),
                max_length=self.max_length,
            )
        except PromptError as error:
            raise SampleError(str(error)) from error
        if encoded.images != len(sample.images):
            raise SampleError(f"an image lies beyond the maximum length of {self.max_length} ids")
        if not encoded.supervised:
            where = f" within {self.max_length} ids" if encoded.truncated else ""
            raise SampleError(f"no supervised token{where}: the answer is empty, cut off, or masked by the template")
        return PreparedText(encoded.input_ids, encoded.labels, encoded.truncated)

    def with_images(self, sample: Sample, text: PreparedText) -> Prepared:
        """The second half: its images.

        Raises:
            SampleError: an image cannot be read.
        """
        images, digest = self.load_images(sample.images)
        return Prepared(ModelInput(text.input_ids, text.labels, images), digest, text.truncated)

    def load_images(self, references: tuple[str, ...]) -> tuple[torch.Tensor, str]:
        """Pixel values ``[n, 3, h, w]`` (or features ``[n, P, C]``) of a sample's images, and their SHA-256.

        Raises:
            SampleError: an image is missing, damaged, too large or outside the image folder.
        """
        if not references:
            return torch.zeros(0), ""
        loaded = [self.features.get(reference) or self._load_image(reference) for reference in references]
        digests = [digest for digest, _ in loaded]
        together = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return torch.stack([values for _, values in loaded]), together

    def _load_image(self, reference: str) -> tuple[str, torch.Tensor]:
        path = self.image_root / reference
        try:
            inside = path.resolve().is_relative_to(self.image_root.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a name that no file can have
            raise SampleError(f"image {reference!r} cannot be a file: {error}") from error
        if not inside:
            raise SampleError(f"image {reference!r} lies outside the image folder {self.image_root}")
        try:
            data = read_image_bytes(path)
            pixels = self.images(decode_image(data, str(path)))
        except ImageError as error:
            raise SampleError(f"image {error}") from error
        return hashlib.sha256(data).hexdigest(), pixels


def check_text(sample: Sample) -> None:
    """Refuse text that no tokenizer takes.

    Raises:
        SampleError: half of a surrogate pair, which JSON can escape but UTF-8 cannot hold.
    """
    try:
        for _, text in sample.turns:
            text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"its text is not Unicode: {error}") from error

"""One sample to one model input: text to ids and labels, images to pixel values (or ready tower features).

A sample that cannot be prepared is a :class:`SampleError`: the caller names it, counts it and stops when there are too many.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from alignkd.errors import SampleError
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.encoder import Encoder, Planned
from alignkd.models.encoders.images import ImageError, decode_image, image_size, read_image_bytes
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.sample import Sample


@dataclass(frozen=True)
class Prepared:
    """A model input, the SHA-256 of its image files ("" without images), and whether text was cut off."""

    input: ModelInput
    image_sha256: str
    truncated: bool


@dataclass
class Preparer:
    """Everything that turns a sample into a model input; safe to send to worker processes."""

    encoder: Encoder
    image_root: Path
    features: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Tower features by image reference, with the file's SHA-256; an image found here is not read again."""

    @classmethod
    def of(
        cls, vlm: Vlm, *, template: str, max_length: int, image_root: str | Path | None, with_spans: bool = True
    ) -> "Preparer":
        """The preparer of a loaded model; ``with_spans``: see :class:`alignkd.inputs.encoder.Encoder`."""
        encoder = vlm.encoder(template, max_length)
        encoder.with_spans = with_spans
        return cls(encoder, Path(image_root or "."))

    def __call__(self, sample: Sample) -> Prepared:
        """Prepare one sample: its text is tokenised once, and each image file is opened once.

        Raises:
            SampleError: an image cannot be read, or no supervised token is left.
        """
        check_text(sample)
        images, digest = self.load_images(sample.images)
        made, truncated = self.encoder.encode(sample.turns, images)
        return Prepared(made, digest, truncated)

    def text(self, sample: Sample) -> Planned:
        """The first half: its length, and its ids and labels where they do not depend on its images.

        Raises:
            SampleError: no supervised token is left, an image lies beyond the maximum length, or the size of an image is needed
                and cannot be read.
        """
        check_text(sample)
        sizes = [self._size(reference) for reference in sample.images] if self.encoder.needs_sizes else []
        return self.encoder.plan(sample.turns, len(sample.images), sizes)

    def with_images(self, sample: Sample, text: Planned) -> Prepared:
        """The second half: its images.

        Raises:
            SampleError: an image cannot be read, or the sample cannot be used with it.
        """
        images, digest = self.load_images(sample.images)
        made, truncated = self.encoder.finish(sample.turns, text, images)
        return Prepared(made, digest, truncated)

    def question(self, sample: Sample) -> ModelInput:
        """A sample up to where its last answer begins.

        Raises:
            SampleError: its last turn is no answer, or an image cannot be read.
        """
        check_text(sample)
        images, _ = self.load_images(sample.images)
        return self.encoder.question(sample.turns, images)

    def load_images(self, references: tuple[str, ...]) -> tuple[list[Any], str]:
        """A sample's images as the encoder takes them (or features ``[P, C]`` each), and their SHA-256.

        Raises:
            SampleError: an image is missing, damaged, too large or outside the image folder.
        """
        if not references:
            return [], ""
        loaded = [self.features.get(reference) or self._load_image(reference) for reference in references]
        digests = [digest for digest, _ in loaded]
        together = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return [values for _, values in loaded], together

    def decoded_images(self, sample: Sample) -> list[Image.Image]:
        """A sample's images, decoded and otherwise unchanged.

        Raises:
            SampleError: one cannot be read.
        """
        try:
            return [decode_image(read_image_bytes(self._path(name)), name) for name in sample.images]
        except ImageError as error:
            raise SampleError(f"image {error}") from error

    def _path(self, reference: str) -> Path:
        path = self.image_root / reference
        try:
            inside = path.resolve().is_relative_to(self.image_root.resolve())
        except (OSError, RuntimeError, ValueError) as error:  # a loop of links, or a name that no file can have
            raise SampleError(f"image {reference!r} cannot be a file: {error}") from error
        if not inside:
            raise SampleError(f"image {reference!r} lies outside the image folder {self.image_root}")
        return path

    def _size(self, reference: str) -> tuple[int, int]:
        try:
            return image_size(self._path(reference))
        except ImageError as error:
            raise SampleError(f"image {error}") from error

    def _load_image(self, reference: str) -> tuple[str, Any]:
        path = self._path(reference)
        try:
            data = read_image_bytes(path)
            image = self.encoder.load(decode_image(data, str(path)))
        except ImageError as error:
            raise SampleError(f"image {error}") from error
        return hashlib.sha256(data).hexdigest(), image


def check_text(sample: Sample) -> None:
    """Reject text that no tokenizer takes.

    Raises:
        SampleError: it holds half of a surrogate pair, which JSON can escape but UTF-8 cannot encode.
    """
    try:
        for _, text in sample.turns:
            text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"its text is not Unicode: {error}") from error

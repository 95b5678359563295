"""One sample to one model input: text to ids and labels, images to pixel values (or ready tower features).

A sample that cannot be prepared is a :class:`SampleError`: the caller names it, counts it and stops when there are too many.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from alignkd.errors import SampleError, TransientError
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.encoder import Encoder, Planned
from alignkd.models.encoders.image_files import ImageError, image_size, open_image, read_image_bytes
from alignkd.models.encoders.rgb import rgb_by_pillow, what_is_lost
from alignkd.models.encoders.templates.chat_template import check_date
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.doubtful_images import DoubtfulImages
from alignkd.pipeline.data.image_paths import image_path
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.runtime.retries import with_retries


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
    doubtful: DoubtfulImages = field(default_factory=DoubtfulImages)

    @classmethod
    def of(
        cls,
        vlm: Vlm,
        *,
        template: str,
        max_length: int,
        image_root: str | Path | None,
        with_spans: bool = True,
        prompt_date: str | None = None,
    ) -> "Preparer":
        """The preparer of a loaded model; ``with_spans`` and ``prompt_date``: see :class:`alignkd.inputs.encoder.Encoder`."""
        encoder = vlm.encoder(template, max_length)
        encoder.with_spans = with_spans
        if prompt_date and encoder.prompt_date:
            encoder.prompt_date = check_date(prompt_date)
        return cls(encoder, Path(image_root or "."))

    def __call__(self, sample: Sample) -> Prepared:
        """Prepare one sample: its text is tokenised once, and each image file is opened once.

        Raises:
            SampleError: an image cannot be read, or no supervised token is left.
        """
        check_text(sample)
        with _memory_for(sample):
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
        with _memory_for(sample):
            sizes = [self._size(reference) for reference in sample.images] if self.encoder.needs_sizes else []
            return self.encoder.plan(sample.turns, len(sample.images), sizes)

    def with_images(self, sample: Sample, text: Planned) -> Prepared:
        """The second half: its images.

        Raises:
            SampleError: an image cannot be read, or the sample cannot be used with it.
        """
        with _memory_for(sample):
            images, digest = self.load_images(sample.images)
            made, truncated = self.encoder.finish(sample.turns, text, images)
        return Prepared(made, digest, truncated)

    def question(self, sample: Sample) -> ModelInput:
        """A sample up to where its last answer begins.

        Raises:
            SampleError: its last turn is no answer, or an image cannot be read.
        """
        check_text(sample)
        with _memory_for(sample):
            images, _ = self.load_images(sample.images)
            return self.encoder.question(sample.turns, images)

    def load_images(self, references: tuple[str, ...]) -> tuple[list[Any], str]:
        """A sample's images as the encoder takes them (or features ``[P, C]`` each), and their SHA-256.

        Raises:
            SampleError: an image is missing, damaged, too large or outside the image folder.
            TransientError: storage does not answer, or memory is short.
        """
        if not references:
            return [], ""
        loaded = [self.features.get(reference) or self._load_image(reference) for reference in references]
        digests = [digest for digest, _ in loaded]
        together = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        return [values for _, values in loaded], together

    def decoded_images(self, sample: Sample) -> list[Image.Image]:
        """A sample's images in RGB, as the model's own loader gives them.

        Raises:
            SampleError: one cannot be read.
        """
        return [self._decode(reference)[0] for reference in sample.images]

    def _size(self, reference: str) -> tuple[int, int]:
        path = image_path(self.image_root, reference)
        try:
            return with_retries(lambda: image_size(path), f"reading image {path}")
        except ImageError as error:
            raise SampleError(f"image {error}") from error

    def _load_image(self, reference: str) -> tuple[str, Any]:
        image, digest = self._decode(reference)
        return digest, self.encoder.load(image)

    def _decode(self, reference: str) -> tuple[Image.Image, str]:
        """An image in RGB, and the SHA-256 of its file."""
        path = image_path(self.image_root, reference)
        # Encoders from outside of the package may lack the method; they are given what they always were.
        decode = getattr(self.encoder, "decode", rgb_by_pillow)
        try:
            data = with_retries(lambda: read_image_bytes(path), f"reading image {path}")
            image = open_image(io.BytesIO(data), str(path))
            rgb = decode(image)
        except ImageError as error:
            raise SampleError(f"image {error}" if str(path) in str(error) else f"image {path}: {error}") from error
        if lost := what_is_lost(image, rgb):
            self.doubtful.add(reference, lost)
        return rgb, hashlib.sha256(data).hexdigest()


@contextmanager
def _memory_for(sample: Sample) -> Iterator[None]:
    """Memory that runs out is no fault of the sample: its images are measured before they are decoded.

    Raises:
        TransientError: names the sample.
    """
    try:
        yield
    except MemoryError as error:
        raise TransientError(
            f"sample {sample.id or sample.key!r}: there is not enough memory to prepare it; use fewer workers, or free memory"
        ) from error


def check_text(sample: Sample) -> None:
    """Reject a sample whose record could not be read, and text that no tokenizer takes.

    Raises:
        SampleError: it has a fault; or it holds half of a surrogate pair, which JSON can escape but UTF-8 cannot encode.
    """
    if sample.fault:
        raise SampleError(sample.fault)
    try:
        for _, text in sample.turns:
            text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"its text is not Unicode: {error}") from error

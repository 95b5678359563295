"""One sample to one model input: text to ids and labels, images to pixel values (or ready tower features).

A sample that cannot be prepared is a :class:`SampleError`: the caller names it, counts it and stops when there are too many.
"""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignkd.errors import SampleError, TransientError
from alignkd.inputs.batch import ModelInput
from alignkd.inputs.destroyed import destroy
from alignkd.inputs.encoder import Encoder, Planned
from alignkd.models.encoders.image_files import ImageError, open_image
from alignkd.models.encoders.pillow_rgb import rgb_by_pillow, what_is_lost
from alignkd.models.encoders.templates.chat_template import check_date
from alignkd.models.vlm import Vlm
from alignkd.pipeline.data.doubtful_images import DoubtfulImages
from alignkd.pipeline.data.image_paths import image_path
from alignkd.pipeline.data.images.places import image_reason, place_of, read_place, size_at
from alignkd.pipeline.data.rejected_samples import check_text
from alignkd.pipeline.data.sample import Sample


@dataclass(frozen=True)
class Prepared:
    """A model input, the SHA-256 of its image files ("" without images), and whether text was cut off.

    ``images_unread``: its image files were not read, so that there is no SHA-256 of them.
    """

    input: ModelInput
    image_sha256: str
    truncated: bool
    images_unread: bool = False


@dataclass
class Preparer:
    """Everything that turns a sample into a model input; safe to send to worker processes.

    ``image_root``: the folder of the images, for samples that do not say where theirs are.
    """

    encoder: Encoder
    image_root: Path | None = None
    features: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """Tower features by the place of an image, with the file's SHA-256; an image found here is not read again."""
    doubtful: DoubtfulImages = field(default_factory=DoubtfulImages)
    with_destroyed: bool = False
    """Whether inputs also hold the sample with its images destroyed (:mod:`alignkd.inputs.destroyed`)."""
    reads_images: bool = True
    """Whether image files are read; without, inputs have the places of vision tokens and no images."""

    @classmethod
    def of(
        cls,
        vlm: Vlm,
        *,
        template: str,
        max_length: int,
        image_root: str | Path | None = None,
        with_spans: bool = True,
        prompt_date: str | None = None,
        with_destroyed: bool = False,
        reads_images: bool = True,
    ) -> "Preparer":
        """The preparer of a loaded model; ``with_spans`` and ``prompt_date``: see :class:`alignkd.inputs.encoder.Encoder`."""
        encoder = vlm.encoder(template, max_length)
        encoder.with_spans = with_spans
        if prompt_date and encoder.prompt_date:
            encoder.prompt_date = check_date(prompt_date)
        root = None if image_root is None else Path(image_root)
        return cls(encoder, root, with_destroyed=with_destroyed, reads_images=reads_images)

    def places(self, sample: Sample) -> tuple[str, ...]:
        """Where each image of a sample is; its references where this preparer has an image folder.

        Raises:
            SampleError: an image lies outside the working directory, and nothing says where it is.
        """
        if self.image_root is not None:
            return sample.images
        return sample.places or tuple(place_of(None, reference) for reference in sample.images)

    def __call__(self, sample: Sample) -> Prepared:
        """Prepare one sample: its text is tokenised once, and each image file is opened once.

        Raises:
            SampleError: an image cannot be read, or no supervised token is left.
        """
        check_text(sample)
        if not self.reads_images:
            made, truncated = self.encoder.finish(sample.turns, self.text(sample), [])
            return Prepared(made, "", truncated, images_unread=True)
        with memory_for(sample):
            images, digest, destroyed = self._open(sample)
            made, truncated = self.encoder.encode(sample.turns, images)
            made = self._with_destroyed(sample, made, destroyed)
        return Prepared(made, digest, truncated)

    def text(self, sample: Sample) -> Planned:
        """The first half: its length, and its ids and labels where they do not depend on its images.

        Raises:
            SampleError: no supervised token is left, an image lies beyond the maximum length, or the size of an image is needed
                and cannot be read.
        """
        check_text(sample)
        with memory_for(sample):
            sizes = [self._size(place) for place in self.places(sample)] if self.encoder.needs_sizes else []
            return self.encoder.plan(sample.turns, len(sample.images), sizes)

    def with_images(self, sample: Sample, text: Planned) -> Prepared:
        """The second half: its images.

        Raises:
            SampleError: an image cannot be read, or the sample cannot be used with it.
        """
        with memory_for(sample):
            images, digest, destroyed = self._open(sample)
            made, truncated = self.encoder.finish(sample.turns, text, images)
            made = self._with_destroyed(sample, made, destroyed)
        return Prepared(made, digest, truncated)

    def _open(self, sample: Sample) -> tuple[list[Any], str, list[Any]]:
        """A sample's images, their SHA-256, and the images destroyed, if that is asked for; each file is decoded once."""
        places = self.places(sample)
        if not self.with_destroyed or not places:
            return *self.load_images(places), []
        decoded = [self._decode(place) for place in places]
        loaded = [
            self.features.get(place) or (digest, self.encoder.load(image))
            for place, (image, digest) in zip(places, decoded, strict=True)
        ]
        destroyed = [self.encoder.load(destroy(image)) for image, _ in decoded]
        return [values for _, values in loaded], _together([digest for digest, _ in loaded]), destroyed

    def _with_destroyed(self, sample: Sample, made: ModelInput, images: list[Any]) -> ModelInput:
        """The input, with that of the sample's destroyed images, if there are any.

        Raises:
            SampleError: the family makes other ids of the destroyed images, so that the two cannot be compared.
        """
        if not images:
            return made
        destroyed, _ = self.encoder.encode(sample.turns, images)
        if not np.array_equal(destroyed.input_ids, made.input_ids):
            raise SampleError(
                f"its {len(made.input_ids)} token ids become {len(destroyed.input_ids)} others with its images destroyed, so"
                " the advantage of its tokens cannot be told: cache without advantage among --targets"
            )
        return replace(made, destroyed=destroyed)

    def question(self, sample: Sample) -> ModelInput:
        """A sample up to where its last answer begins.

        Raises:
            SampleError: its last turn is no answer, or an image cannot be read.
        """
        check_text(sample)
        with memory_for(sample):
            images, _ = self.load_images(self.places(sample))
            return self.encoder.question(sample.turns, images)

    def load_images(self, places: tuple[str, ...]) -> tuple[list[Any], str]:
        """Images as the encoder takes them (or features ``[P, C]`` each), and their SHA-256; ``places``: :meth:`places`.

        Raises:
            SampleError: an image is missing, damaged, too large or outside the image folder.
            TransientError: storage does not answer, or memory is short.
        """
        if not places:
            return [], ""
        loaded = [self.features.get(place) or self._load_image(place) for place in places]
        return [values for _, values in loaded], _together([digest for digest, _ in loaded])

    def decoded_images(self, sample: Sample) -> list[Image.Image]:
        """A sample's images in RGB, as the model's own loader gives them.

        Raises:
            SampleError: one cannot be read.
        """
        return [self._decode(place)[0] for place in self.places(sample)]

    def _path(self, place: str) -> str:
        return place if self.image_root is None else str(image_path(self.image_root, place))

    def _size(self, place: str) -> tuple[int, int]:
        path = self._path(place)
        try:
            return size_at(path)
        except ImageError as error:
            raise SampleError(f"image {error}") from error

    def _load_image(self, place: str) -> tuple[str, Any]:
        image, digest = self._decode(place)
        return digest, self.encoder.load(image)

    def _decode(self, place: str) -> tuple[Image.Image, str]:
        """An image in RGB, and the SHA-256 of its file."""
        path = self._path(place)
        # Encoders from outside of the package may lack the method; they are given what they always were.
        decode = getattr(self.encoder, "decode", rgb_by_pillow)
        try:
            data = read_place(path)
            image = open_image(io.BytesIO(data), path)
            rgb = decode(image)
        except ImageError as error:
            raise SampleError(image_reason(path, error)) from error
        if lost := what_is_lost(image, rgb):
            self.doubtful.add(place, lost)
        return rgb, hashlib.sha256(data).hexdigest()


def _together(digests: list[str]) -> str:
    """The digest of a sample's images: that of its only one, or of all of theirs."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


@contextmanager
def memory_for(sample: Sample) -> Iterator[None]:
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

"""What a row of a cache was made from: its images and its text, found in the data file again. Needs no torch."""

import hashlib
from dataclasses import dataclass

import numpy as np

from alignkd.errors import DataError
from alignkd.models.encoders.image_files import ImageError, decode_image, upright
from alignkd.pipeline.config.shared import DataSettings
from alignkd.pipeline.data.images.places import read_place
from alignkd.pipeline.data.open_samples import open_samples


@dataclass(frozen=True)
class RowSource:
    """``pictures``: RGB ``[h, w, 3]`` of values in 0..1, one for each image. ``text``: of all turns, one after the other."""

    pictures: list[np.ndarray]
    text: str


def find_source(
    data: str | tuple[str, ...], images: str | tuple[str, ...] | None, key: str, image_sha256: str, *, turned: bool
) -> RowSource:
    """The sample of a row's key, with its images; ``turned``: as their EXIF orientation says, where the teacher saw them so.

    Raises:
        DataError: the data file does not hold it, or an image cannot be read or is not the one the row was made from.
    """
    samples = open_samples(DataSettings(data=data, images=images))
    found = np.flatnonzero((samples.keys == np.frombuffer(bytes.fromhex(key), np.uint8)).all(axis=1))
    if not len(found):
        raise DataError(f"{data} does not hold the sample of this row: give the --data that the cache was written from")
    sample = samples[int(found[0])]
    try:
        files = [read_place(place) for place in sample.places]
        decoded = [decode_image(file, place) for file, place in zip(files, sample.places, strict=True)]
    except ImageError as error:
        raise DataError(f"image {error}; give the --images that the cache was written from") from error
    pictures = [np.asarray(upright(image) if turned else image, np.float32) / 255 for image in decoded]
    digests = [hashlib.sha256(file).hexdigest() for file in files]
    together = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    if digests and together != image_sha256:
        raise DataError(f"the images of sample {sample.id!r} in {images} are not those that its row was made from")
    return RowSource(pictures, "".join(text for _, text in sample.turns))

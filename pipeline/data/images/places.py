"""Where the bytes of an image are, in one text, and how they are read.

A place is an absolute path. It comes from a reader, never from the data itself: :func:`place_of` checks what the data says.
"""

import os
from pathlib import Path

from alignkd.models.encoders.image_files import image_size, read_image_bytes
from alignkd.pipeline.data.image_paths import image_path
from alignkd.pipeline.runtime.retries import with_retries


def place_of(root: str | None, reference: str) -> str:
    """The place of an image by its reference in the data; ``root``: the image folder, None for the working directory.

    Raises:
        SampleError: it lies outside the image folder.
    """
    return os.path.abspath(image_path(Path(root or "."), reference))


def read_place(place: str) -> bytes:
    """The bytes of an image.

    Raises:
        ImageError: there is no such file, or it is too large.
        TransientError: storage does not answer.
    """
    return with_retries(lambda: read_image_bytes(Path(place)), f"reading image {place}")


def size_at(place: str) -> tuple[int, int]:
    """Width and height of an image after its orientation is applied, from the head of its file.

    Raises:
        ImageError: there is no such file, or it is no image.
        TransientError: storage does not answer.
    """
    return with_retries(lambda: image_size(Path(place)), f"reading image {place}")

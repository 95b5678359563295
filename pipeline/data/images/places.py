"""Where the bytes of an image are, in one text, and how they are read.

A place is an absolute path or a URL, or begins with the scheme of a reader whose files hold images: its module reads it with
``read_image(place)``. It comes from a reader, never from the data itself: :func:`place_of` checks what the data says.
"""

import importlib
import io
import os
import posixpath
from pathlib import Path

from alignkd.errors import SampleError
from alignkd.models.encoders.image_files import image_size, read_image_bytes, size_of_image
from alignkd.pipeline.data.files.remote import is_remote, remote_image
from alignkd.pipeline.data.image_paths import image_path
from alignkd.pipeline.runtime.retries import with_retries

_SCHEMES = {"tar:": "webdataset", "row:": "tables"}
"""The readers whose files hold images."""

HELD = tuple(_SCHEMES)
"""How the place of an image begins that a data file holds."""


def place_of(root: str | None, reference: str) -> str:
    """The place of an image by its reference in the data; ``root``: the image folder, None for the working directory.

    Raises:
        SampleError: it lies outside the image folder.
    """
    if root is None or not is_remote(root):
        folder = os.path.abspath(root or ".")
        if not os.path.isabs(reference):
            # As image_path does it, in a tenth of its time: data of millions of samples asks for each of their images.
            place = os.path.normpath(os.path.join(folder, reference))
            if place.startswith(folder.rstrip(os.sep) + os.sep):
                return place
        return os.path.abspath(image_path(Path(root or "."), reference))
    name = posixpath.normpath(reference)
    if name.startswith(("/", "../")) or name in (".", "..") or "::" in name or "\0" in name:
        raise SampleError(f"image {reference!r} lies outside the image folder {root}")
    return f"{root.rstrip('/')}/{name}"


def read_place(place: str) -> bytes:
    """The bytes of an image.

    Raises:
        ImageError: there is no such file, or it is too large.
        TransientError: storage does not answer.
    """
    if (scheme := place[:4]) in _SCHEMES:
        reader = importlib.import_module(f"alignkd.pipeline.data.readers.{_SCHEMES[scheme]}")
        data: bytes = reader.read_image(place)
        return data
    if is_remote(place):
        with remote_image(place) as file:
            return file.read()
    return with_retries(lambda: read_image_bytes(Path(place)), f"reading image {place}")


def size_at(place: str) -> tuple[int, int]:
    """Width and height of an image after its orientation is applied, from the head of its file.

    Raises:
        ImageError: there is no such file, or it is no image.
        TransientError: storage does not answer.
    """
    if place[:4] in _SCHEMES:
        return size_of_image(io.BytesIO(read_place(place)), place)
    if is_remote(place):
        with remote_image(place) as file:
            return size_of_image(file, place)
    return with_retries(lambda: image_size(Path(place)), f"reading image {place}")


def image_reason(place: str, error: Exception) -> str:
    """The reason of a sample whose image cannot be used: it names the place once."""
    return f"image {error}" if place in str(error) else f"image {place}: {error}"

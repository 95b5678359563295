"""Image files, which are other people's data: what is read and decoded is bounded, any unreadable file an :class:`ImageError`.

Faults of storage (:func:`alignkd.errors.is_transient`) are no fault of the image, and pass unchanged.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps

from alignkd.errors import SampleError, is_transient
from alignkd.plain_files import open_plain, read_plain

MAX_IMAGE_PIXELS = 64_000_000
"""An image larger than this (8,000 x 8,000) is rejected before it is decoded."""
MAX_IMAGE_SIDE = 65_535
"""The longest side a JPEG can have. Pillow's resizing and the processors take more memory than pixels for longer ones."""
MAX_IMAGE_BYTES = 256 * 2**20
_PNG_START = 8
_PNG_TEXT = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_TURNED = (5, 6, 7, 8)
"""Orientations that exchange width and height."""


class ImageError(SampleError):
    """An image file is missing, too large or cannot be decoded."""


def read_image_bytes(path: Path) -> bytes:
    """The file's bytes.

    Raises:
        ImageError: no such file, not a plain one, or larger than :data:`MAX_IMAGE_BYTES`.
        OSError: a fault of storage, which another attempt may not meet.
    """
    with _of_the_file(path):
        return read_plain(path, MAX_IMAGE_BYTES)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height after its orientation is applied, from the file's header.

    Raises:
        ImageError: no such file, not an image, or one of too many pixels.
        OSError: a fault of storage, which another attempt may not meet.
    """
    with _of_the_file(path), open_plain(path) as file:
        return size_of_image(file, str(path))


def size_of_image(file: BinaryIO, name: str) -> tuple[int, int]:
    """As :func:`image_size`, of an opened file."""
    image = open_image(file, name)
    width, height = image.size
    # Pillow turns TIFF files itself.
    turned = image.format != "TIFF" and _orientation_of_header(image, file) in _TURNED
    return (height, width) if turned else (width, height)


@contextmanager
def _of_the_file(path: Path) -> Iterator[None]:
    try:
        yield
    except ImageError:
        raise
    except (OSError, ValueError) as error:
        if is_transient(error):
            raise
        raise ImageError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def open_image(file: BinaryIO, name: str) -> Image.Image:
    """The image of a file, of which only the header is read: :func:`read_pixels` reads the rest.

    Raises:
        ImageError: not an image, or more than :data:`MAX_IMAGE_PIXELS` or :data:`MAX_IMAGE_SIDE`.
    """
    with _readable(name):
        image = Image.open(file)
    if image.format == "EPS":
        raise ImageError(f"{name}: an EPS file is a program and not an image; convert it to PNG or JPEG")
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ImageError(f"{name}: {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS:,}")
    if max(image.size) > MAX_IMAGE_SIDE:
        raise ImageError(f"{name}: {image.width} x {image.height} pixels, a side of more than {MAX_IMAGE_SIDE:,}")
    return image


def read_pixels(image: Image.Image, name: str = "its file") -> Image.Image:
    """The image with its pixels read: the first of an animation.

    Raises:
        ImageError: it is damaged or cut short.
    """
    with _readable(name):
        image.load()
    return image


def decode_image(data: bytes, name: str) -> Image.Image:
    """An RGB image as Pillow's ``convert`` gives it: the loader of LLaVA's and MobileVLM's training code.

    Raises:
        ImageError: not an image, damaged, or more than :data:`MAX_IMAGE_PIXELS` or :data:`MAX_IMAGE_SIDE`.
    """
    image = open_image(io.BytesIO(data), name)
    with _readable(name):
        return image.convert("RGB")


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own size warning; the limit on pixels refuses instead
            yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of error on damaged data
        if is_transient(error):
            raise
        # Pillow names the object that it reads, with its address: the same file would have another reason each time.
        what = re.sub(r" <_io\.[^>]*>", "", str(error))
        raise ImageError(f"{name}: not a readable image ({type(error).__name__}: {what})") from error


def upright(image: Image.Image) -> Image.Image:
    """The image, with its pixels read, turned as its EXIF orientation says; an orientation that is damaged counts as none."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds of error on a damaged EXIF block
        return image
    return ImageOps.exif_transpose(image) if found in range(2, 9) else image


def _orientation_of_header(image: Image.Image, file: BinaryIO) -> object:
    """EXIF orientation of an image whose pixels are not read; of a PNG, they are if its metadata may come after them."""
    try:
        if image.format == "PNG" and _has_text_after_pixels(file):
            image.load()
        # The method of PNG files would read the pixels.
        return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # Pillow raises many kinds of error on a damaged EXIF block
        if is_transient(error):
            raise
        return 1


def _has_text_after_pixels(file: BinaryIO) -> bool:
    """Whether a PNG file has metadata behind its pixels."""
    place, position, pixels = file.tell(), _PNG_START, False
    try:
        while len(head := (file.seek(position), file.read(8))[1]) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels and kind in _PNG_TEXT:
                return True
            pixels = pixels or kind == b"IDAT"
            position += 12 + length
        return False
    finally:
        file.seek(place)

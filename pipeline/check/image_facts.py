"""What is found of each image file, which is read once, whatever the number of samples that show it."""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from alignkd.models.encoders.image_files import ImageError, open_image, size_of_image
from alignkd.models.encoders.pillow_rgb import has_transparency, is_deep, what_is_lost
from alignkd.pipeline.check.tally import Found, Named, kind_of
from alignkd.pipeline.data.images.places import image_reason, read_place

NO_SIZE = (0, 0)
TRANSPARENT = "transparency"
DEEP = "more than 8 bits a channel"
EMPTY = "nothing to see: one value"
CUT_OFF = "values cut at 255"

Decode = Callable[[Image.Image], Image.Image]


@dataclass(frozen=True)
class ImageFact:
    """One image: its (width, height), format, and kinds of doubt with their words.

    ``head_fault``: why its size cannot be read, in the form of a sample's reason; ``fault``: why it cannot be used.
    """

    size: tuple[int, int] = NO_SIZE
    format: str = ""
    doubts: tuple[tuple[str, str], ...] = ()
    head_fault: str = ""
    fault: str = ""


def place_hash(place: str) -> int:
    """What an image is known by: 64 bits of a hash of its place."""
    return int.from_bytes(hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def look_at(place: str, decode: Decode) -> ImageFact:
    """Read one image as a model's own loader does.

    Raises:
        TransientError: storage does not answer.
    """
    try:
        data = read_place(place)
        size = size_of_image(io.BytesIO(data), place)
    except ImageError as error:
        return ImageFact(head_fault=f"image {error}", fault=image_reason(place, error))
    try:
        image = open_image(io.BytesIO(data), place)
        rgb = decode(image)
    except ImageError as error:
        return ImageFact(size, fault=image_reason(place, error))
    lost = what_is_lost(image, rgb)
    doubts = [(TRANSPARENT, f"its mode is {image.mode}")] if has_transparency(image) else []
    doubts += [(DEEP, f"its mode is {image.mode}")] if is_deep(image) else []
    doubts += [(CUT_OFF if "cuts them" in lost else EMPTY, lost)] if lost else []
    return ImageFact(size, image.format or "unknown", tuple(doubts))


@dataclass
class ImageTally:
    """Images in counts; ``sides``: width and height of each that can be read, int32 ``[images, 2]``."""

    first: int
    read: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    doubtful: Found = field(init=False)
    unreadable: Found = field(init=False)
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.doubtful, self.unreadable = Found(self.first), Found(self.first)

    def add(self, place: str, fact: ImageFact) -> None:
        """Count one image."""
        self.read += 1
        if fact.fault:
            self.unreadable.add(kind_of(fact.fault, place), Named(place, fact.fault))
            return
        self.formats[fact.format] += 1
        self.sizes.append(fact.size)
        for kind, words in fact.doubts:
            self.doubtful.add(kind, Named(place, words))


@dataclass
class Facts:
    """The facts about all images that samples need to be judged by, by the hash of their places; small enough to be sent.

    ``hashes``: uint64 ``[images]`` in order; ``sizes``: int32 ``[images, 2]``; ``faults``: by hash, the fault of the head and
    that of the whole.
    """

    hashes: np.ndarray
    sizes: np.ndarray
    faults: dict[int, tuple[str, str]]

    @classmethod
    def of(cls, hashes: Sequence[int], facts: Sequence[ImageFact]) -> "Facts":
        """From the facts of different images."""
        known = np.asarray(hashes, dtype=np.uint64)
        order = np.argsort(known, kind="stable")
        sizes = np.asarray([fact.size for fact in facts], dtype=np.int32).reshape(-1, 2)
        faults = {
            one: (fact.head_fault, fact.fault) for one, fact in zip(hashes, facts, strict=True) if fact.head_fault or fact.fault
        }
        return cls(known[order], sizes[order], faults)

    def size(self, place: str) -> tuple[int, int]:
        """Width and height of an image."""
        width, height = self.sizes[np.searchsorted(self.hashes, np.uint64(place_hash(place)))].tolist()
        return width, height

    def fault(self, place: str) -> tuple[str, str]:
        """Why the size cannot be read, and why the image cannot be used; empty where nothing is wrong."""
        return self.faults.get(place_hash(place), ("", ""))

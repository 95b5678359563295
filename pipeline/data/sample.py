"""One sample: the fields of its record, checked, and its key.

A record is ``{"id", "image" (absent, a path or a list), "conversations": [{"from": "human"|"gpt", "value"}]}``, or of another
shape that :mod:`alignkd.pipeline.data.turns` reads; the same content has the same key in every shape. A video is a list of its
frames, which are images: ``{"video": ["0.jpg", "1.jpg"]}``, or a list of such lists, one for each ``<video>`` in the text.

What LLaVA's training code reads is read in the same way (``preprocess_multimodal``, ``prepare_inputs_labels_for_multimodal``):

* without an image, ``<image>`` is text;
* an image that no ``<image>`` names is not used;
* several ``<image>`` in a turn of a sample with one image are one.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from alignkd.errors import SampleError
from alignkd.inputs.prompts import IMAGE_TAG
from alignkd.pipeline.data.provenance import DATA, Author, read_author
from alignkd.pipeline.data.provenance import NOT_READ as PROVENANCE_NOT_READ
from alignkd.pipeline.data.turns import has_images, kind_of, merged, read_turns, references, short

_VIDEO_TAG = "<video>"
_TAGS = re.compile(f"{IMAGE_TAG}|{_VIDEO_TAG}")
_quote = json.encoder.encode_basestring

TAG_IS_TEXT = f"{IMAGE_TAG} is read as text: there is no image"
IMAGE_UNUSED = f"the image is not used: the text has no {IMAGE_TAG}"


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images. ``key``: a hash of ``id``, ``images`` and ``turns``, 32 hexadecimal
    characters.

    ``images``: the references of its images, which are part of the key; ``places``: where the bytes of each are, empty where
    only the reader of the image folder knows. ``provenance``: the model that wrote its answers, "" for those of the data
    itself, and ``provenance_weights`` the digest of that model's weights. ``source``: the name of its dataset. None of these
    is part of the key.

    ``fault``: why its record cannot be read; such a sample has a key of its record and nothing else, and is rejected when it
    is prepared. ``note``: what of its record is read otherwise than its author may have meant.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    key: str
    fault: str = ""
    note: str = ""
    places: tuple[str, ...] = ()
    provenance: str = ""
    source: str = ""
    provenance_weights: str = ""

    @property
    def author(self) -> Author:
        """Who wrote its answers."""
        return Author(self.provenance, self.provenance_weights)


def parse_sample(record: Any, where: str) -> Sample:
    """As :func:`read_sample`; ``where`` begins each message: which record it is."""
    try:
        return read_sample(record)
    except SampleError as error:
        raise SampleError(f"{where}: {error}") from None


def read_sample(record: Any, *, merge_turns: bool = False) -> Sample:
    """Check one record, and compute its key; ``merge_turns``: join consecutive turns of one speaker with a line break.

    Raises:
        SampleError: a field is missing or has the wrong type, or the images are not those that the text names.
    """
    if not isinstance(record, dict):
        raise SampleError(f"found {kind_of(record)}, expected an object with 'conversations' or 'messages'")
    turns, named = read_turns(record)
    turns = merged(turns) if merge_turns else turns
    images = references(record)
    if named:
        if images:
            raise SampleError("it lists its images, and its contents name theirs: expected one of the two")
        images = named
    if record.get("video"):
        images, turns = _with_frames(images, turns, record["video"])
    note, tags = "", _tags_in(turns)
    if tags != len(images):
        if not tags:
            images, note = [], IMAGE_UNUSED
        elif not has_images(record) and not named:
            note = TAG_IS_TEXT
        else:
            turns = [(speaker, _with_one_tag(text)) for speaker, text in turns] if len(images) == 1 else turns
            if _tags_in(turns) != len(images):
                raise SampleError(f"{tags} {IMAGE_TAG} in the text but {len(images)} images; the numbers must be equal")
    sample_id = "" if record.get("id") is None else str(record["id"])
    author = read_author(record.get("provenance"))
    note = note if author is not None else note or PROVENANCE_NOT_READ
    model, weights = author or DATA
    key = _key(sample_id, images, turns)
    return Sample(sample_id, tuple(images), tuple(turns), key, note=note, provenance=model, provenance_weights=weights)


def faulty_sample(record: Any, text: bytes, fault: str) -> Sample:
    """What stands for a record that cannot be read, so that it is rejected like any other sample.

    Its key does not depend on how the file writes the record, if that is JSON. ``record``: None where it is not.
    """
    given = record.get("id") if isinstance(record, dict) else None
    sample_id = str(given) if isinstance(given, str | int | float) else ""
    try:
        content = json.dumps(record, sort_keys=True).encode() if record is not None else text.strip()
    except (RecursionError, ValueError):
        content = text.strip()
    return Sample(sample_id, (), (), hashlib.sha256(b"a record that cannot be read\0" + content).hexdigest()[:32], fault)


def _tags_in(turns: list[tuple[str, str]]) -> int:
    return sum(text.count(IMAGE_TAG) for _, text in turns)


def _with_one_tag(text: str) -> str:
    return f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip() if text.count(IMAGE_TAG) > 1 else text


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(path, str) and path for path in value)


def _with_frames(images: list[str], turns: list[tuple[str, str]], video: Any) -> tuple[list[str], list[tuple[str, str]]]:
    """Images and turns with each ``<video>`` replaced by one ``<image>`` for each of its frames."""
    videos = [video] if _are_paths(video) else video
    if not isinstance(videos, list) or not all(_are_paths(frames) and frames for frames in videos):
        raise SampleError(
            f"'video' is {short(video)}, expected a list of its frames' image files: take frames from a video file first"
        )
    tags = [tag for _, text in turns for tag in _TAGS.findall(text)]
    if (tags.count(_VIDEO_TAG), tags.count(IMAGE_TAG)) != (len(videos), len(images)):
        raise SampleError(
            f"{tags.count(IMAGE_TAG)} {IMAGE_TAG} and {tags.count(_VIDEO_TAG)} {_VIDEO_TAG} in the text but"
            f" {len(images)} images and {len(videos)} videos; the numbers must be equal"
        )
    remaining, shown = {IMAGE_TAG: iter([[path] for path in images]), _VIDEO_TAG: iter(videos)}, list[str]()

    def replace(tag: re.Match[str]) -> str:
        frames = next(remaining[tag[0]])
        shown.extend(frames)
        return "\n".join([IMAGE_TAG] * len(frames))

    turns = [(speaker, _TAGS.sub(replace, text)) for speaker, text in turns]
    return shown, turns


def _key(sample_id: str, images: list[str], turns: list[tuple[str, str]]) -> str:
    # The text of json.dumps without spaces, in a third of its time: a plan takes keys of millions of samples.
    spoken = ",".join(f"[{_quote(speaker)},{_quote(text)}]" for speaker, text in turns)
    content = f"[{_quote(sample_id)},[{','.join(map(_quote, images))}],[{spoken}]]"
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]

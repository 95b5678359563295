"""One sample of a LLaVA-format file: its fields, checked, and its key.

A record is ``{"id", "image" (absent, a path or a list), "conversations": [{"from": "human"|"gpt", "value"}]}``. A video is a
list of its frames, which are images: ``{"video": ["0.jpg", "1.jpg"]}``, or a list of such lists, one for each ``<video>`` in
the text.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from alignkd.errors import DataError
from alignkd.inputs.prompts import IMAGE_TAG

_VIDEO_TAG = "<video>"
_TAGS = re.compile(f"{IMAGE_TAG}|{_VIDEO_TAG}")
_quote = json.encoder.encode_basestring


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images. ``key``: a hash of the other fields, 32 hexadecimal characters."""

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    key: str


def parse_sample(record: Any, where: str) -> Sample:
    """Check one record, and compute its key. ``where`` begins each message: the file and the record's number.

    Raises:
        DataError: a field is missing or has the wrong type, or the number of ``<image>`` is not the number of images.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: found a {type(record).__name__}, expected an object with 'conversations'")
    conversations = record.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: 'conversations' is {_short(conversations)}, expected a list of turns")
    turns = []
    for turn in conversations:
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt") or not isinstance(turn.get("value"), str):
            raise DataError(f"{where}: turn {_short(turn)}, expected {{'from': 'human' or 'gpt', 'value': text}}")
        turns.append((turn["from"], turn["value"]))
    image = record.get("image")
    images = [] if image is None else [image] if isinstance(image, str) else image
    if not _are_paths(images):
        raise DataError(f"{where}: 'image' is {_short(image)}, expected a path or a list of paths")
    if record.get("video") is not None:
        images, turns = _with_frames(images, turns, record["video"], where)
    tags = sum(text.count(IMAGE_TAG) for _, text in turns)
    if tags != len(images):
        raise DataError(f"{where}: {tags} {IMAGE_TAG} in the text but {len(images)} images; the numbers must be equal")
    sample_id = "" if record.get("id") is None else str(record["id"])
    return Sample(sample_id, tuple(images), tuple(turns), _key(sample_id, images, turns))


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(path, str) and path for path in value)


def _with_frames(
    images: list[str], turns: list[tuple[str, str]], video: Any, where: str
) -> tuple[list[str], list[tuple[str, str]]]:
    """Images and turns with each ``<video>`` replaced by one ``<image>`` for each of its frames."""
    videos = [video] if _are_paths(video) else video
    if not isinstance(videos, list) or not all(_are_paths(frames) and frames for frames in videos):
        raise DataError(
            f"{where}: 'video' is {_short(video)}, expected a list of its frames' image files: take frames from a video file"
            " first"
        )
    tags = [tag for _, text in turns for tag in _TAGS.findall(text)]
    if (tags.count(_VIDEO_TAG), tags.count(IMAGE_TAG)) != (len(videos), len(images)):
        raise DataError(
            f"{where}: {tags.count(IMAGE_TAG)} {IMAGE_TAG} and {tags.count(_VIDEO_TAG)} {_VIDEO_TAG} in the text but"
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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

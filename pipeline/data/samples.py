"""LLaVA-format data files, read as a stream and indexed by byte offset, so that a file of several GB is never held whole.

A sample is ``{"id", "image" (absent, a path or a list), "conversations": [{"from": "human"|"gpt", "value"}]}``; the file is a
JSON list or JSON lines. A video is a list of its frames, which are images: ``{"video": ["0.jpg", "1.jpg"]}``, or a list of such
lists, each in the place of a ``<video>`` in the text.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignkd.inputs.prompts import IMAGE_TAG

_CHUNK = 4 * 2**20
_LARGEST_SAMPLE = 64 * 2**20
_NO_IMAGE = 0
"""Stands for the hash of no image references."""
_VIDEO_TAG = "<video>"
_TAGS = re.compile(f"{IMAGE_TAG}|{_VIDEO_TAG}")
_quote = json.encoder.encode_basestring
_BETWEEN = re.compile(r"[ \t\r\n]*(?P<comma>,?)[ \t\r\n]*(?P<end>\]?)")


class DataError(ValueError):
    """A data file is not LLaVA's format."""


@dataclass(frozen=True)
class Sample:
    """One conversation about zero or more images; ``key`` is a hash of everything else, 32 hex characters."""

    id: str
    images: tuple[str, ...]
    turns: tuple[tuple[str, str], ...]
    key: str


def parse_sample(record: Any, where: str) -> Sample:
    """Check one record and give it its key.

    Raises:
        DataError: a field is missing or of the wrong kind, or the number of ``<image>`` is not the number of images.
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
        raise DataError(f"{where}: {tags} {IMAGE_TAG} in the text but {len(images)} images; they must be as many")
    sample_id = "" if record.get("id") is None else str(record["id"])
    return Sample(sample_id, tuple(images), tuple(turns), _key(sample_id, images, turns))


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(path, str) and path for path in value)


def _with_frames(
    images: list[str], turns: list[tuple[str, str]], video: Any, where: str
) -> tuple[list[str], list[tuple[str, str]]]:
    """Images and turns with each ``<video>`` replaced by an ``<image>`` for each of its frames."""
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
            f" {len(images)} images and {len(videos)} videos; they must be as many"
        )
    left, shown = {IMAGE_TAG: iter([[path] for path in images]), _VIDEO_TAG: iter(videos)}, list[str]()

    def put(tag: re.Match[str]) -> str:
        frames = next(left[tag[0]])
        shown.extend(frames)
        return "\n".join([IMAGE_TAG] * len(frames))

    turns = [(speaker, _TAGS.sub(put, text)) for speaker, text in turns]
    return shown, turns


def _key(sample_id: str, images: list[str], turns: list[tuple[str, str]]) -> str:
    # What json.dumps gives for the three, without spaces, in a third of its time: millions of samples are planned.
    spoken = ",".join(f"[{_quote(speaker)},{_quote(text)}]" for speaker, text in turns)
    content = f"[{_quote(sample_id)},[{','.join(map(_quote, images))}],[{spoken}]]"
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _image_hash(references: tuple[str, ...]) -> bytes:
    if not references:
        return _NO_IMAGE.to_bytes(8, "little")
    return hashlib.blake2b("\0".join(references).encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class SampleFile:
    """Random access to the samples of a data file; holds offsets and keys, not texts.

    ``SampleFile(path)`` reads the whole file once and checks every sample; ``SampleFile.known`` goes by what such a
    reading found before.

    Raises:
        DataError: not LLaVA's format; names the record and what was found.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        starts, lengths, keys, images = array("q"), array("q"), bytearray(), bytearray()
        try:
            with self.path.open("rb") as file:
                for number, (start, text, record) in enumerate(_records(file, self.path)):
                    sample = self._parse(text, number, record)
                    starts.append(start)
                    lengths.append(len(text))
                    keys += bytes.fromhex(sample.key)
                    images += _image_hash(sample.images)
        except OSError as error:
            raise DataError(f"data file {self.path}: {error.strerror}") from error
        if not starts:
            raise DataError(f"data file {self.path} holds no samples")
        self.starts, self.lengths = np.asarray(starts), np.asarray(lengths)
        self.keys = np.frombuffer(bytes(keys), dtype=np.uint8).reshape(-1, 16)
        self.image_hashes: np.ndarray | None = np.frombuffer(bytes(images), dtype="<u8")
        self._opened: dict[str, BinaryIO] = {}

    @classmethod
    def known(cls, path: str | Path, keys: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> "SampleFile":
        """Samples of known keys ``[N, 16]`` at known byte ranges; each is compared with its key when it is read."""
        file = cls.__new__(cls)
        file.path, file.keys, file.starts, file.lengths, file._opened = Path(path), keys, starts, lengths, {}
        file.image_hashes = None
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Sample:
        if not self._opened:
            # The first of two threads wins: to put one open file in another's place would close that while it is read.
            self._opened.setdefault("file", self.path.open("rb"))
        # Without a shared position in the file, several threads may read.
        text = os.pread(self._opened["file"].fileno(), int(self.lengths[index]), int(self.starts[index]))
        with suppress(DataError):
            sample = self._parse(text, index)
            if sample.key == self.key(index):
                return sample
        raise DataError(
            f"data file {self.path}, sample {index}: the file has changed since it was indexed; restore it, or write another"
            " cache"
        )

    def key(self, index: int) -> str:
        """The key of sample ``index``, without reading the file."""
        raw: bytes = self.keys[index].tobytes()
        return raw.hex()

    def unique(self) -> np.ndarray:
        """Indices of the first sample of each key, in file order: identical samples share a row."""
        halves = np.ascontiguousarray(self.keys).view(">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        # lexsort is stable, so the first of equal keys is the first in the file.
        new = np.r_[True, (halves[order][1:] != halves[order][:-1]).any(axis=1)]
        return np.sort(order[new])

    def by_image(self) -> np.ndarray:
        """The indices of :meth:`unique`, but samples of the same image references together, where the first of them is.

        A cache then stores what depends on the images alone once, or twice where a shard ends between them.
        """
        assert self.image_hashes is not None, "the file was not read, only looked into"
        order = self.unique()
        hashes = self.image_hashes[order]
        _, first, image = np.unique(hashes, return_index=True, return_inverse=True)
        place = np.where(hashes == _NO_IMAGE, np.arange(len(order)), first[image])
        return order[np.argsort(place, kind="stable")]

    def _parse(self, text: bytes, number: int, record: Any = None) -> Sample:
        if record is None:
            try:
                record = json.loads(text)
            except (ValueError, UnicodeDecodeError) as error:
                raise DataError(f"data file {self.path}, record {number}: not JSON ({error})") from error
        name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
        return parse_sample(record, f"data file {self.path}, record {number}{name}")


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes, Any]]:
    """``(offset, bytes, value or None where it is still to be decoded)`` of each record of a JSON list or of JSON lines."""
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    file.seek(start)
    first = file.read(_CHUNK).lstrip()[:1]
    file.seek(start)
    if first == b"[":
        yield from _list_records(file, path, start)
    elif first == b"{":
        for line in file:
            if line.strip():
                yield start, line, None
            start += len(line)
    else:
        raise DataError(f"data file {path}: begins with {first!r}, expected a JSON list or JSON lines of LLaVA samples")


def _list_records(file: BinaryIO, path: Path, offset: int) -> Iterator[tuple[int, bytes, Any]]:
    # Latin-1 maps each byte to one character, so positions in the text are byte offsets; JSON's own syntax is ASCII.
    decoder = json.JSONDecoder()
    text = file.read(_CHUNK).decode("latin-1")
    position, separator = text.index("[") + 1, ""
    while True:
        match = _BETWEEN.match(text, position)
        assert match is not None
        if match["end"] and not match["comma"]:
            _refuse_more(path, offset + match.end(), [text[match.end() :].encode("latin-1")])
            _refuse_more(path, offset + match.end(), iter(lambda: file.read(_CHUNK), b""))
            return
        value, end = None, len(text)
        if match.end() < len(text):
            if match["comma"] != separator:
                raise DataError(
                    f"data file {path}: not a JSON list: a comma is missing or too many at byte {offset + position}"
                )
            with suppress(ValueError):
                value, end = decoder.raw_decode(text, match.end())
        if end == len(text):
            more = file.read(_CHUNK).decode("latin-1")
            if not more or len(text) - position > _LARGEST_SAMPLE:
                raise DataError(f"data file {path}: not JSON from byte {offset + match.end()} on (cut short, or not a list)")
            text, offset, position = text[position:] + more, offset + position, 0
            continue
        record = text[match.end() : end]
        yield offset + match.end(), record.encode("latin-1"), value if record.isascii() else None
        position, separator = end, ","


def _refuse_more(path: Path, at: int, rest: Iterable[bytes]) -> None:
    if any(part.strip(b" \t\r\n") for part in rest):
        raise DataError(f"data file {path}: the list ends at byte {at}, but more follows")

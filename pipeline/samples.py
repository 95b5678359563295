"""LLaVA-format data files, read as a stream and indexed by byte offset, so that a file of several GB is never held whole.

A sample is ``{"id", "image" (absent, a path or a list), "conversations": [{"from": "human"|"gpt", "value"}]}``; the file is a
JSON list or JSON lines.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignkd.prompts import IMAGE_TAG

_CHUNK = 4 * 2**20
_LARGEST_SAMPLE = 64 * 2**20


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
    if not isinstance(images, list) or not all(isinstance(path, str) and path for path in images):
        raise DataError(f"{where}: 'image' is {_short(image)}, expected a path or a list of paths")
    tags = sum(text.count(IMAGE_TAG) for _, text in turns)
    if tags != len(images):
        raise DataError(f"{where}: {tags} {IMAGE_TAG} in the text but {len(images)} images; they must be as many")
    sample_id = "" if record.get("id") is None else str(record["id"])
    content = json.dumps([sample_id, images, turns], ensure_ascii=False, separators=(",", ":"))
    key = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return Sample(sample_id, tuple(images), tuple(turns), key)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class SampleFile:
    """Random access to the samples of a data file; holds offsets and keys, not texts.

    Opening it reads the whole file once and checks every sample.

    Raises:
        DataError: not LLaVA's format; names the record and what was found.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        starts, lengths, keys = array("q"), array("q"), bytearray()
        try:
            with self.path.open("rb") as file:
                for number, (start, text) in enumerate(_records(file, self.path)):
                    sample = self._parse(text, number)
                    starts.append(start)
                    lengths.append(len(text))
                    keys += bytes.fromhex(sample.key)
        except OSError as error:
            raise DataError(f"data file {self.path}: {error.strerror}") from error
        if not starts:
            raise DataError(f"data file {self.path} holds no samples")
        self._starts, self._lengths = np.asarray(starts), np.asarray(lengths)
        self.keys = np.frombuffer(bytes(keys), dtype=np.uint8).reshape(-1, 16)
        self._file: BinaryIO | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Sample:
        if self._file is None:
            self._file = self.path.open("rb")
        self._file.seek(int(self._starts[index]))
        return self._parse(self._file.read(int(self._lengths[index])), index)

    def key(self, index: int) -> str:
        """The key of sample ``index``, without reading the file."""
        raw: bytes = self.keys[index].tobytes()
        return raw.hex()

    def unique(self) -> np.ndarray:
        """Indices of the first sample of each key, in file order: identical samples share a row."""
        _, first = np.unique(self.keys.view("V16").ravel(), return_index=True)
        return np.sort(first)

    def _parse(self, text: bytes, number: int) -> Sample:
        try:
            record = json.loads(text)
        except (ValueError, UnicodeDecodeError) as error:
            raise DataError(f"data file {self.path}, record {number}: not JSON ({error})") from error
        name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
        return parse_sample(record, f"data file {self.path}, record {number}{name}")


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """``(offset, bytes)`` of each record of a JSON list or of JSON lines."""
    start = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
    file.seek(start)
    first = file.read(_CHUNK).lstrip()[:1]
    file.seek(start)
    if first == b"[":
        yield from _list_records(file, path, start)
    elif first == b"{":
        for line in file:
            if line.strip():
                yield start, line
            start += len(line)
    else:
        raise DataError(f"data file {path}: begins with {first!r}, expected a JSON list or JSON lines of LLaVA samples")


def _list_records(file: BinaryIO, path: Path, offset: int) -> Iterator[tuple[int, bytes]]:
    # Latin-1 maps each byte to one character, so positions in the text are byte offsets; JSON's own syntax is ASCII.
    decoder = json.JSONDecoder()
    text = file.read(_CHUNK).decode("latin-1")
    position = text.index("[") + 1
    while True:
        position, at_end = _skip(text, position, ", \t\r\n"), False
        if position < len(text) and text[position] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, position)
            at_end = end == len(text)
        except ValueError:
            end, at_end = position, True
        if at_end:
            more = file.read(_CHUNK).decode("latin-1")
            if not more or len(text) - position > _LARGEST_SAMPLE:
                raise DataError(f"data file {path}: not JSON from byte {offset + position} on (cut short, or not a list)")
            text, offset, position = text[position:] + more, offset + position, 0
            continue
        yield offset + position, text[position:end].encode("latin-1")
        position = end


def _skip(text: str, position: int, characters: str) -> int:
    while position < len(text) and text[position] in characters:
        position += 1
    return position

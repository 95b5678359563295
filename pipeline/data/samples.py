"""LLaVA-format data files, indexed by byte offset, so that a file of several GB is never held in memory as a whole.

A file is a JSON list, or JSON lines, of the records that :mod:`alignkd.pipeline.data.sample` reads.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from alignkd.errors import DataError
from alignkd.pipeline.data.sample import Sample, parse_sample

_CHUNK = 4 * 2**20
_LARGEST_SAMPLE = 64 * 2**20
_NO_IMAGE = 0
"""The image hash of a sample without images."""
_BETWEEN = re.compile(r"[ \t\r\n]*(?P<comma>,?)[ \t\r\n]*(?P<end>\]?)")


def _image_hash(references: tuple[str, ...]) -> bytes:
    if not references:
        return _NO_IMAGE.to_bytes(8, "little")
    return hashlib.blake2b("\0".join(references).encode("utf-8", "surrogatepass"), digest_size=8).digest()


class SampleFile:
    """Random access to the samples of a data file; holds offsets and keys, not texts.

    ``SampleFile(path)`` reads the whole file once and checks every sample; ``SampleFile.known`` takes offsets and keys that
    an earlier reading found.

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
            # The first of two threads wins: replacing an open file would close it while another thread reads it.
            self._opened.setdefault("file", self.path.open("rb"))
        # pread has no shared position in the file, so several threads may read.
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
        """The indices of :meth:`unique`, with samples of the same image references moved to the first of them.

        A cache then stores per-image data once, or twice where a shard ends between two such samples.
        """
        assert self.image_hashes is not None, "by_image needs a SampleFile that read its file: not one of SampleFile.known"
        order = self.unique()
        hashes = self.image_hashes[order]
        _, first, image = np.unique(hashes, return_index=True, return_inverse=True)
        group = np.where(hashes == _NO_IMAGE, np.arange(len(order)), first[image])
        return order[np.argsort(group, kind="stable")]

    def _parse(self, text: bytes, number: int, record: Any = None) -> Sample:
        if record is None:
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"data file {self.path}, record {number}: not JSON ({error})") from error
        name = f" (id {record['id']!r})" if isinstance(record, dict) and "id" in record else ""
        return parse_sample(record, f"data file {self.path}, record {number}{name}")


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes, Any]]:
    """``(offset, bytes, value)`` of each record of a JSON list or of JSON lines; the value is None where it is not decoded."""
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
            with suppress(ValueError, RecursionError):
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

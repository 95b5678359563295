"""Data files of records, indexed by byte offset, so that a file of several GB is never held in memory as a whole.

A file is a JSON list, or JSON lines, of the records that :mod:`alignkd.pipeline.data.sample` reads. A record that cannot be
read is a sample with a ``fault``, which is rejected by name when it is prepared.
"""

import hashlib
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from alignkd.errors import AlignkdError, DataError, SampleError
from alignkd.pipeline.data import records
from alignkd.pipeline.data.contract import NO_IMAGE, Authors, Samples, Source
from alignkd.pipeline.data.files.data_file import open_data_file
from alignkd.pipeline.data.files.remote import is_remote
from alignkd.pipeline.data.images.placed import placed
from alignkd.pipeline.data.provenance import Author
from alignkd.pipeline.data.sample import Sample, faulty_sample, read_sample
from alignkd.pipeline.runtime.retries import with_retries

T = TypeVar("T")

_log = logging.getLogger(__name__)


def image_hash(references: tuple[str, ...]) -> bytes:
    """Eight bytes, equal for equal references; those of :data:`NO_IMAGE` for none."""
    if not references:
        return NO_IMAGE.to_bytes(8, "little")
    return hashlib.blake2b("\0".join(references).encode("utf-8", "surrogatepass"), digest_size=8).digest()


class SampleFile(Samples):
    """Random access to the samples of a data file; holds offsets and keys, not texts.

    ``SampleFile(path)`` reads the whole file once and checks every sample; ``SampleFile.known`` takes offsets and keys that
    an earlier reading found. With a ``source``, samples say where their images are. ``numbers`` are the samples' numbers in
    the file, from 0; None where they are not known.
    ``faults`` counts the records that cannot be read.

    Raises:
        DataError: the file cannot be read, is not in a known format, or holds no record that can be read.
        TransientError: storage does not answer.
    """

    path: Path | str

    def __init__(self, path: str | Path, source: Source | None = None) -> None:
        self.path, self.source = (str(path) if is_remote(str(path)) else Path(path)), source
        self._opened: dict[str, BinaryIO] = {}
        self.faults = 0
        try:
            self._try(self._index)
        except AlignkdError:
            raise
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) or "null byte" in str(error):
                raise DataError(f"data file {self.path}: {getattr(error, 'strerror', None) or error}") from error
            raise

    def _index(self) -> None:
        starts, lengths, keys, images, counts = array("q"), array("q"), bytearray(), bytearray(), array("i")
        faults, first, notes = 0, list[str](), Counter[str]()
        authors, written_by = array("i"), dict[Author, int]()
        with open_data_file(str(self.path)) as file:
            for number, record in enumerate(records.read_records(file, self.path)):
                sample = _parse(record, number, merge_turns=self._merge)
                starts.append(record.start)
                lengths.append(record.length)
                keys += bytes.fromhex(sample.key)
                images += image_hash(sample.images)
                counts.append(len(sample.images))
                authors.append(written_by.setdefault(sample.author, len(written_by)))
                if sample.fault:
                    faults += 1
                    first += [sample.fault] if len(first) < 3 else []
                if sample.note:
                    notes[sample.note] += 1
        if not starts:
            raise DataError(f"data file {self.path} holds no samples")
        if faults == len(starts):
            raise DataError(
                f"data file {self.path}: none of its {faults:,} records can be read, expected LLaVA or messages samples in a"
                f" JSON list or one a line. First: {'; '.join(first)}"
            )
        for note, count in notes.items():
            _log.warning("%s: in %s of %s records %s", self.path, f"{count:,}", f"{len(starts):,}", note)
        self.faults = faults
        self.numbers: np.ndarray | None = np.arange(len(starts))
        self.starts, self.lengths = np.asarray(starts), np.asarray(lengths)
        self.keys = np.frombuffer(bytes(keys), dtype=np.uint8).reshape(-1, 16)
        self.image_hashes = np.frombuffer(bytes(images), dtype="<u8")
        self.image_counts = np.asarray(counts)
        self.authors = Authors(tuple(written_by), np.asarray(authors))

    @classmethod
    def known(
        cls,
        path: str | Path,
        keys: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        numbers: np.ndarray | None = None,
        source: Source | None = None,
    ) -> "SampleFile":
        """Samples of known keys ``[N, 16]`` at known byte ranges; each is compared with its key when it is read."""
        file = cls.__new__(cls)
        file.path, file.source = (str(path) if is_remote(str(path)) else Path(path)), source
        file.keys, file.starts, file.lengths = keys, starts, lengths
        file.numbers, file.faults, file._opened = numbers, 0, {}
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    @property
    def _merge(self) -> bool:
        return self.source is not None and self.source.merge_turns

    @property
    def image_space(self) -> str:
        """The image folder: data that share it share their pictures."""
        return str(self.source.images if self.source else None)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each record."""
        return self.lengths

    def locators(self) -> dict[str, np.ndarray]:
        """Byte offsets and lengths; the number of each record where one that has no id may have to be named."""
        found = {"starts": self.starts.astype("<i8"), "lengths": self.lengths.astype("<i8")}
        if self.faults and self.numbers is not None:
            found["numbers"] = self.numbers.astype("<i8")
        return found

    def __getitem__(self, index: int) -> Sample:
        start, length = int(self.starts[index]), int(self.lengths[index])
        text = self._read(start, length if length <= records.LARGEST_RECORD else records.KEPT)
        record = records.Record(start, length, text)
        if self.numbers is None:
            sample = _parse(record, start, "the record at byte {}", merge_turns=self._merge)
        else:
            sample = _parse(record, int(self.numbers[index]), merge_turns=self._merge)
        if sample.key == self.key(index):
            return sample if self.source is None else placed(sample, self.source)
        raise DataError(
            f"data file {self.path}, the record at byte {start}: the file has changed since it was indexed; restore it, or"
            " write another cache"
        )

    def _read(self, start: int, length: int) -> bytes:
        try:
            return self._try(lambda: self._pread(start, length))
        except AlignkdError:
            raise
        except OSError as error:
            raise DataError(f"data file {self.path}: {error.strerror or error}") from error

    def _try(self, call: Callable[[], T]) -> T:
        """The result of a call that reads; what reads from URLs tries again by itself."""
        return call() if is_remote(str(self.path)) else with_retries(call, f"reading data file {self.path}")

    def _pread(self, start: int, length: int) -> bytes:
        if not (file := self._opened.get("file")):
            # The first of two threads wins: replacing an open file would close it while another thread reads it.
            file = self._opened.setdefault("file", open_data_file(str(self.path)))
        try:
            # pread has no shared position in the file, so several threads may read.
            return os.pread(file.fileno(), length, start)
        except OSError:
            # The handle may be stale, so the next attempt opens the file again. Another thread keeps its own while it reads.
            self._opened.pop("file", None)
            raise


def _parse(record: records.Record, number: int, place: str = "record {}", *, merge_turns: bool = False) -> Sample:
    """The sample of a record; one that cannot be read has a fault. ``place`` says what it is the ``number`` of."""
    value, fault = record.value, ""
    if record.length > records.LARGEST_RECORD:
        fault = f"{record.length:,} bytes, more than the {records.LARGEST_RECORD:,} a record may have"
        return faulty_sample(None, b"%d " % record.length + record.text, f"{place.format(number)}: {fault}")
    try:
        value = json.loads(record.text) if value is None else value
        return read_sample(value, merge_turns=merge_turns)
    except SampleError as error:
        fault = str(error)
    except RecursionError:
        value, fault = None, "it is nested too deeply"
    except ValueError as error:
        value, fault = None, f"not JSON ({error})"
    name = f" (id {value['id']!r:.80})" if isinstance(value, dict) and "id" in value else ""
    return faulty_sample(value, record.text, f"{place.format(number)}{name}: {fault}")

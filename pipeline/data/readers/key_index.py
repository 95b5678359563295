"""What is known of every sample after one reading of its file: keys, images, faults."""

import logging
from array import array
from collections import Counter

import numpy as np

from alignkd.errors import DataError
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.data.samples import image_hash

_log = logging.getLogger(__name__)


class KeyIndex:
    """Collects samples, one after the other, and keeps 28 bytes of each."""

    def __init__(self) -> None:
        self._keys, self._images, self._counts = bytearray(), bytearray(), array("i")
        self._first, self._notes = list[str](), Counter[str]()
        self.faults = 0

    def add(self, sample: Sample) -> None:
        """The next sample."""
        self._keys += bytes.fromhex(sample.key)
        self._images += image_hash(sample.images)
        self._counts.append(len(sample.images))
        if sample.fault:
            self.faults += 1
            self._first += [sample.fault] if len(self._first) < 3 else []
        if sample.note:
            self._notes[sample.note] += 1

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def keys(self) -> np.ndarray:
        """uint8 ``[N, 16]``."""
        return np.frombuffer(bytes(self._keys), dtype=np.uint8).reshape(-1, 16)

    @property
    def image_hashes(self) -> np.ndarray:
        """uint64 ``[N]``."""
        return np.frombuffer(bytes(self._images), dtype="<u8")

    @property
    def image_counts(self) -> np.ndarray:
        """int32 ``[N]``."""
        return np.asarray(self._counts)

    def check(self, where: str, expected: str) -> None:
        """Refuse data without a record that can be read, and say in a warning what is read otherwise than it may be meant.

        Raises:
            DataError: there is no such record.
        """
        if not len(self):
            raise DataError(f"{where} holds no samples")
        if self.faults == len(self):
            first = "; ".join(self._first)
            raise DataError(f"{where}: none of its {len(self):,} records can be read, expected {expected}. First: {first}")
        for note, count in self._notes.items():
            _log.warning("%s: in %s of %s records %s", where, f"{count:,}", f"{len(self):,}", note)

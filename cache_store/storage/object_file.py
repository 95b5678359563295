"""An object as a seekable file, read in parts: for what lies in a few kilobytes of a large shard."""

from __future__ import annotations

import io
from typing import Any

from alignkd.cache_store.storage.contract import Storage

_BUFFER = 16 << 10


class _Parts(io.RawIOBase):
    """The parts of an object, each one request; the last ``tail`` bytes are read once, and kept."""

    def __init__(self, storage: Storage, name: str, size: int, tail: int) -> None:
        self.storage, self.name, self.size = storage, name, size
        self._at = 0
        self._tail_at = max(size - tail, 0) if tail else size
        self._tail = storage.read_range(name, self._tail_at, size) if tail else b""

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position of the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as the object goes."""
        stop = min(self._at + len(buffer), self.size)
        if self._at >= self._tail_at:
            data = self._tail[self._at - self._tail_at : stop - self._tail_at]
        else:
            data = self.storage.read_range(self.name, self._at, stop)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_object(storage: Storage, name: str, size: int, *, tail: int = 0, buffer: int = _BUFFER) -> io.BufferedReader:
    """An object of ``size`` bytes as a file.

    ``tail``: bytes at its end that are read first, in one request. ``buffer``: bytes of each other request at least.
    """
    return io.BufferedReader(_Parts(storage, name, size, tail), buffer)

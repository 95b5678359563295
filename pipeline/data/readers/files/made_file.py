"""Files that are made of data once and kept in the local cache. Any of them may vanish, and is made again."""

import io
import mmap
from collections.abc import Callable
from typing import Any, BinaryIO

from alignkd.pipeline.data.files.local_cache import CopyWriter, local_cache

_BUFFER = 4 << 20


def made_file(about: str, make: Callable[[BinaryIO], None]) -> BinaryIO:
    """The file that ``make`` writes, opened; ``about`` says what it is made from and how, versions included.

    Raises:
        LocalCacheFullError: it is larger than the local cache may be.
        TransientError: the disk is full, or does not answer.
    """

    def fill(writer: CopyWriter) -> None:
        # Each write to the cache takes its lock: few large ones.
        with io.BufferedWriter(_Writer(writer), _BUFFER) as file:
            make(file)

    return local_cache().open(f"made\0{about}", fill)


def mapped(file: BinaryIO) -> Any:
    """The bytes of an opened file, mapped into memory; empty bytes of an empty file. The file may be closed and removed."""
    with file:
        size = file.seek(0, io.SEEK_END)
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""


class _Writer(io.RawIOBase):
    def __init__(self, writer: CopyWriter) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._writer.write(bytes(data))
        return len(data)

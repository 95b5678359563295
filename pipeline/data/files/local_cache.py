"""Copies of files from elsewhere on this machine's disk, of a stated size: the copy that was used least recently goes first.

Any number of processes and threads share a folder. Space is taken before bytes are written, under a lock, so that the folder
never grows above its size; a copy appears by a rename, whole. What a killed process left is removed when room is made.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from alignkd.errors import AlignkdError, ConfigError, DataError, TransientError, is_transient
from alignkd.pipeline.runtime.printable import printable

FOLDER_VARIABLE, SIZE_VARIABLE = "ALIGNKD_CACHE", "ALIGNKD_CACHE_SIZE"
DEFAULT_SIZE = "50GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)B?", re.ASCII | re.IGNORECASE)
_ROOM_LEFT = 0.1
"""Where room is made, this share of the size is freed: looking through a folder of many files takes long."""

Fill = Callable[["CopyWriter"], None]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``50GB`` or ``500M``.

    Raises:
        ConfigError: it is none.
    """
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise ConfigError(f"the size of the local cache is {text!r}: expected one such as {DEFAULT_SIZE} or 500MB")
    return size


def default_folder() -> Path:
    """``ALIGNKD_CACHE``, else ``alignkd`` below ``XDG_CACHE_HOME``, else ``~/.cache/alignkd``; in it, the folder ``data``."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named) / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignkd" / "data"


def local_cache() -> "LocalCache":
    """The local cache of this process and of those that it starts."""
    return LocalCache(default_folder(), parse_size(os.environ.get(SIZE_VARIABLE) or DEFAULT_SIZE))


class LocalCacheFullError(DataError):
    """A file is larger than the whole local cache may be."""


class LocalCache:
    """Files by name below ``folder``, of at most ``most`` bytes together."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self.most = folder, most

    def open(self, about: str, fill: Fill) -> BinaryIO:
        """The copy of what ``about`` describes, opened; ``fill`` writes it where there is none. The caller closes it.

        Raises:
            LocalCacheFullError: it is larger than the cache may be.
            ConfigError: the folder cannot be written to.
            TransientError: the disk is full, or does not answer.
        """
        name = hashlib.sha256(about.encode("utf-8", "surrogatepass")).hexdigest()
        path = self.folder / name[:2] / name[2:]
        try:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
                os.utime(file.fileno())  # when it was used last
                return file
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return self._filled(path, about, fill)
        except OSError as error:
            if isinstance(error, AlignkdError):
                raise
            if is_transient(error) or not isinstance(error, PermissionError | NotADirectoryError):
                raise TransientError(
                    f"the local cache {self.folder}: {error.strerror or error}. Free space, or name another folder with"
                    f" {FOLDER_VARIABLE}; then run the same command again"
                ) from error
            raise ConfigError(
                f"the local cache {self.folder}: {error.strerror}; name another folder with {FOLDER_VARIABLE}"
            ) from error

    def _filled(self, path: Path, about: str, fill: Fill) -> BinaryIO:
        temporary = path.with_name(f".{path.name[:16]}-{secrets.token_hex(8)}")
        with self._locked():
            file = temporary.open("x+b")
            fcntl.flock(file, fcntl.LOCK_EX)  # says that somebody still writes it
        try:
            fill(CopyWriter(self, file, about))
            file.flush()
            os.fsync(file.fileno())
            with self._locked() as used:
                used.value -= path.stat().st_size if path.exists() else 0  # another process made the same copy
                os.replace(temporary, path)
            file.seek(0)
        except BaseException:
            with self._locked() as used:
                used.value -= os.fstat(file.fileno()).st_size
                temporary.unlink(missing_ok=True)
            file.close()
            raise
        return file

    def take(self, file: BinaryIO, size: int, about: str) -> None:
        """Let a file that is written have ``size`` bytes, and remove copies that were not used for long where need be.

        Raises:
            LocalCacheFullError: the cache cannot be so large.
        """
        with self._locked() as used:
            more = size - os.fstat(file.fileno()).st_size
            if used.value + more > self.most:
                used.value = self._make_room(more)
            if used.value + more > self.most:
                raise LocalCacheFullError(
                    f"{printable(about)}: {size:,} bytes so far, and the local cache may have {self.most:,} in all: give"
                    " --local-cache a larger size, such as 200GB"
                )
            os.ftruncate(file.fileno(), size)
            used.value += more

    def _make_room(self, more: int) -> int:
        """Remove the oldest copies until ``more`` bytes have room, and some; the bytes that are left."""
        copies, total = list[tuple[float, int, Path]](), 0
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                if path.name.startswith(".") and _is_abandoned(path):
                    path.unlink(missing_ok=True)
                    continue
                total += about.st_size
                if not path.name.startswith("."):
                    copies.append((about.st_mtime, about.st_size, path))
        wanted = max(0, int(self.most * (1 - _ROOM_LEFT)) - more)
        for _, size, path in sorted(copies):
            if total <= wanted:
                break
            path.unlink(missing_ok=True)
            total -= size
        return total

    @contextmanager
    def _locked(self) -> Iterator["_Used"]:
        """The bytes of all files, to be read and changed by one process and thread at a time."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with (self.folder / "used").open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            text = file.read(32)
            used = _Used(int(text) if text.isdigit() else self._make_room(0))
            try:
                yield used
            finally:
                file.truncate(0)
                file.write(b"%d" % max(0, used.value))
                file.flush()


class _Used:
    def __init__(self, value: int) -> None:
        self.value = value


class CopyWriter:
    """Writes a copy; each part has its room before it is written."""

    def __init__(self, cache: LocalCache, file: BinaryIO, about: str) -> None:
        self.cache, self.file, self.about, self.size = cache, file, about, 0

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            LocalCacheFullError: the cache cannot be so large.
        """
        self.cache.take(self.file, self.size + len(data), self.about)
        self.file.write(data)
        self.size += len(data)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody writes a copy any more: who does holds a lock on it."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

"""Bytes of data files by name and range: local paths and fsspec URLs."""

import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from alignkd.cache_store.storage import open_storage
from alignkd.cache_store.storage.contract import Storage
from alignkd.cache_store.storage.object_file import open_object
from alignkd.errors import DataError, wrap_errors
from alignkd.pipeline.runtime.retries import with_retries
from alignkd.plain_files import open_plain


class ShardFile:
    """One file of data. It holds no open file when it is pickled, and may be read by several threads.

    Raises:
        DataError: the file cannot be read.
        TransientError: storage does not answer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._opened: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_opened": {}}

    @property
    def local(self) -> bool:
        """Whether it lies on this machine."""
        return "://" not in self.name or self.name.startswith("file://")

    @property
    def absolute(self) -> str:
        """The name, wherever this process works."""
        return os.path.abspath(self.path) if self.local else self.name

    @property
    def path(self) -> Path:
        """Where a local file lies."""
        return Path(self.name.removeprefix("file://"))

    def size(self) -> int:
        """Bytes."""
        if self.local:
            return int(self._try(lambda: os.fstat(self._file().fileno()).st_size))
        size = self._storage().size(self._last)
        if size is None:
            raise DataError(f"data file {self.name}: No such file")
        return size

    def read(self, start: int, length: int) -> bytes:
        """A range; fewer bytes where the file ends before."""
        if self.local:
            # pread has no shared position in the file, so several threads may read.
            return cast(bytes, self._try(lambda: os.pread(self._file().fileno(), length, start)))
        try:
            return self._storage().read_range(self._last, start, start + length)
        except FileNotFoundError as error:
            raise DataError(f"data file {self.name}: No such file") from error

    def open(self) -> BinaryIO:
        """The file, to be read from its beginning to its end; the caller closes it."""
        if self.local:
            return cast(BinaryIO, self._try(lambda: open_plain(self.path)))
        return cast(BinaryIO, open_object(self._storage(), self._last, self.size(), buffer=_BUFFER))

    def version(self) -> str:
        """A text that changes when the file does, as far as its storage says."""
        if self.local:
            found = self._try(lambda: os.fstat(self._file().fileno()))
            return f"{found.st_size} {found.st_mtime_ns}"
        import fsspec

        with wrap_errors(DataError, f"data file {self.name}", FileNotFoundError):
            files, path = fsspec.core.url_to_fs(self.name)
            return f"{self.size()} {files.ukey(path)}"

    @property
    def _last(self) -> str:
        return self.name.rpartition("/")[2]

    def _storage(self) -> Storage:
        if (storage := self._opened.get("storage")) is None:
            storage = self._opened.setdefault("storage", open_storage(self.name.rpartition("/")[0]))
        return cast(Storage, storage)

    def _file(self) -> BinaryIO:
        if not (file := self._opened.get("file")):
            # The first of two threads wins: replacing an open file would close it while another thread reads it.
            file = self._opened.setdefault("file", open_plain(self.path))
        return cast(BinaryIO, file)

    def _try(self, call: Any) -> Any:
        def attempt() -> Any:
            try:
                return call()
            except OSError:
                # The handle may be stale, so the next attempt opens the file again.
                self._opened.pop("file", None)
                raise

        try:
            return with_retries(attempt, f"reading data file {self.name}")
        except OSError as error:
            raise DataError(f"data file {self.name}: {error.strerror or error}") from error
        except ValueError as error:
            raise DataError(f"data file {self.name}: {error}") from error


_BUFFER = 4 << 20

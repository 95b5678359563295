"""Where a cache lies: a local (or network) folder, or any fsspec URL. Whole objects in, whole objects out.

Every object of a cache is written once and never changed, so a name either gives all of its bytes or does not exist:

* a local file is written under a temporary name, fsynced, linked to its name, and its folder fsynced;
* an object store's PUT is atomic by itself.

Answers that may pass (a 500, a timeout, a lost connection) are asked for again, with longer and longer waits; then one
:class:`StorageError` says what could not be done. Nothing here is opened by anything but a name below the cache's root.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

TEMPORARY = ".tmp-"

_T = TypeVar("_T")
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
_PARALLEL = 16
_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 1}}


class StorageError(OSError):
    """An object could not be read or written; the message says which, why, and what to do."""


class Storage(Protocol):
    """Objects by name (``shards/x.tar``) below one root. FileNotFoundError for a name that is not there."""

    url: str

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        ...

    def write(self, name: str, data: bytes) -> bool:
        """Write an object that was not there, whole or not at all; False, and nothing written, where it was there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the objects in a folder, without the folder; none where there is no folder. Sorted."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where it is not there."""
        ...

    def age_s(self, name: str) -> float:
        """Seconds since an object was written; 0 where it is gone or nobody knows."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; nothing where it is not there."""
        ...


def open_storage(url: str | Path) -> Storage:
    """The storage at a local path or an fsspec URL.

    Raises:
        ValueError: a scheme that fsspec does not know, or whose package is not installed.
    """
    text = str(url)
    if text.startswith("file://"):
        return LocalStorage(text.removeprefix("file://"))
    return RemoteStorage(text) if "://" in text else LocalStorage(text)


def read_all(storage: Storage, names: Sequence[str]) -> Iterator[bytes]:
    """Bytes of many small objects, in order; several at a time, because a distant store answers slowly."""
    if isinstance(storage, LocalStorage):
        yield from map(storage.read, names)
        return
    with ThreadPoolExecutor(_PARALLEL) as pool:
        yield from pool.map(storage.read, names)


class LocalStorage:
    """A folder of a local or network file system."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(root)

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        with self._named("read", name):
            return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> bool:
        """Write an object that was not there; see :class:`Storage`."""
        with self._named("write", name):
            return self._write(self.root / name, data)

    def _write(self, path: Path, data: bytes) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            written = _link(temporary, path)
        finally:
            # Also on a full disk, where every byte counts for the next attempt.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return written

    def names(self, folder: str) -> list[str]:
        """Names in a folder, temporaries included."""
        path = self.root / folder
        with self._named("list", folder or "."):
            return sorted(os.listdir(path)) if path.is_dir() else []

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where it is not there."""
        with self._named("look at", name):
            path = self.root / name
            return path.stat().st_size if path.is_file() else None

    def age_s(self, name: str) -> float:
        """Seconds since an object was written."""
        with contextlib.suppress(*_MISSING):
            return time.time() - (self.root / name).stat().st_mtime
        return 0.0

    def delete(self, name: str) -> None:
        """Remove an object."""
        with contextlib.suppress(FileNotFoundError), self._named("delete", name):
            (self.root / name).unlink()

    @contextlib.contextmanager
    def _named(self, deed: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, _MISSING) and deed != "write":
                raise FileNotFoundError(f"{self.root / name}: not there") from error
            raise StorageError(
                f"cannot {deed} {self.root / name}: {error.strerror or error}. Nothing is half-written; mend this"
                " (space, quota, permissions) and run the same command again"
            ) from error


def _link(temporary: Path, path: Path) -> bool:
    """Give a written file its name, unless the name is taken."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links; the last of two writers wins there, which is as whole
        if path.exists():
            return False
        os.replace(temporary, path)
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folder; its rename is on disk when it returns.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RemoteStorage:
    """Objects at an fsspec URL (``s3://``, ``gs://``, ``memory://`` ...).

    Options such as an endpoint or timeouts come from fsspec's own configuration (``FSSPEC_S3_ENDPOINT_URL``,
    ``FSSPEC_S3_CONFIG_KWARGS='{"read_timeout": 60}'``, or a file in ``~/.config/fsspec``). It holds no connection across a
    fork or a pickle.
    """

    attempts = 6
    first_wait_s = 0.5

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._opened: tuple[int, Any, str] | None = None
        self._filesystem()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        return bytes(self._again("read", name, lambda fs, path: fs.cat_file(path)))

    def write(self, name: str, data: bytes) -> bool:
        """Write an object that was not there; see :class:`Storage`."""

        def put(fs: Any, path: str) -> bool:
            # Not every store heeds the condition below; fs.exists would take a 500 for "no".
            with contextlib.suppress(*_MISSING):
                fs.info(path)
                return False
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError):  # a store that knows no such condition
                fs.pipe_file(path, data)
            return True

        try:
            return self._again("write", name, put)
        except _MISSING as error:
            raise StorageError(f"cannot write {self.url}/{name}: {error}. Create the bucket or folder first") from error

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""

        def listed(fs: Any, path: str) -> list[str]:
            try:
                entries = fs.ls(path, detail=False)
            except _MISSING:
                return []
            return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != path.rstrip("/")})

        return self._again("list", folder, listed)

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where it is not there."""
        try:
            info = self._again("look at", name, lambda fs, path: fs.info(path))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info.get("type") == "file" else None

    def age_s(self, name: str) -> float:
        """Seconds since an object was written."""
        try:
            modified = self._again("look at", name, lambda fs, path: fs.modified(path))
        except (FileNotFoundError, NotImplementedError):
            return 0.0
        return time.time() - float(modified.timestamp())

    def delete(self, name: str) -> None:
        """Remove an object."""
        with contextlib.suppress(FileNotFoundError):
            self._again("delete", name, lambda fs, path: fs.rm_file(path))

    def _again(self, deed: str, name: str, do: Callable[[Any, str], _T]) -> _T:
        for attempt in range(self.attempts):
            try:
                fs, root = self._filesystem()
                fs.invalidate_cache()
                return do(fs, f"{root}/{name}" if name else root)
            except (*_MISSING, NotImplementedError):
                raise
            except PermissionError as error:
                raise StorageError(
                    f"cannot {deed} {self.url}/{name}: {error}. Check the credentials and their rights"
                ) from error
            except Exception as error:
                # Each store's client has errors of its own; what is not a refusal may pass.
                if attempt + 1 == self.attempts:
                    raise StorageError(
                        f"cannot {deed} {self.url}/{name}, tried {self.attempts} times: {type(error).__name__}: {error}."
                        " Nothing is half-written; run the same command again when the store answers"
                    ) from error
                time.sleep(self.first_wait_s * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("the last attempt returns or raises")

    def _filesystem(self) -> tuple[Any, str]:
        if self._opened is None or self._opened[0] != os.getpid():
            import fsspec

            try:
                fs, root = fsspec.core.url_to_fs(self.url, skip_instance_cache=True, **_options(self.url))
            except (ImportError, ValueError) as error:
                raise ValueError(f"--cache {self.url}: {error}") from error
            if _is_s3(self.url):
                fs.retries = 1
            self._opened = (os.getpid(), fs, root.rstrip("/"))
        return self._opened[1], self._opened[2]


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _options(url: str) -> dict[str, Any]:
    """Asking again is :class:`RemoteStorage`'s alone: botocore and s3fs on top would ask a dead store 300 times."""
    if not _is_s3(url):
        return {}
    from fsspec.config import conf

    chosen = conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {**_S3_CONFIG, **chosen}}

"""Objects at an fsspec URL."""

import contextlib
import logging
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from alignkd.cache_store.errors import StorageAccessError, StorageError, UnusableObjectError
from alignkd.cache_store.storage.contract import MISSING, new_temporary
from alignkd.cache_store.storage.remote_errors import Cause, cause_of
from alignkd.errors import ConfigError, is_resumable
from alignkd.extras import missing

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_OPTION = "--cache"

_SMALL = 64 << 20
"""Objects that may be larger are asked for their size before they are read."""

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
"""What fsspec needs for the usual kinds of object store."""

_VERSION = ("size", "ETag", "etag", "md5Hash", "LastModified", "mtime", "created", "blob_id")
"""What the usual kinds of store say of an object, of which some changes whenever the object does."""

_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 1}}


class RemoteStorage:
    """Objects at an fsspec URL (``s3://``, ``gs://``, ``memory://`` ...).

    Options such as an endpoint or timeouts come from fsspec's own configuration (``FSSPEC_S3_ENDPOINT_URL``,
    ``FSSPEC_S3_CONFIG_KWARGS='{"read_timeout": 60}'``, or a file in ``~/.config/fsspec``). No connection is kept across a
    fork or a pickle.
    """

    attempts = 6
    first_wait_s = 0.5
    listing_may_lag = False

    def __init__(self, url: str, option: str = _OPTION) -> None:
        """``option``: of the command line, for messages."""
        self.url, self.option = url.rstrip("/"), option
        self._opened: tuple[int, Any, str] | None = None
        self._filesystem()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """All bytes of an object."""
        # An object store is asked for the size of what may be large. A record costs one request, not two.
        if at_most is not None and at_most > _SMALL:
            found = self.size(name) or 0
            if found > at_most:
                raise UnusableObjectError(f"{self.url}/{name}: found {found} bytes, expected at most {at_most} bytes")
        return bytes(self._retry("read", name, lambda fs, path: fs.cat_file(path)))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """A part of an object."""
        if stop <= start:
            return b""
        return bytes(self._retry("read", name, lambda fs, path: fs.cat_file(path, start=start, end=stop)))

    def write(self, name: str, data: bytes) -> bool:
        """Write a new object; False if the name exists."""

        def put(fs: Any, path: str) -> bool:
            # Some stores ignore mode="create" below. fs.exists would take a 500 for "no".
            with contextlib.suppress(*MISSING):
                fs.info(path)
                return False
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError):  # a store without conditional writes
                fs.pipe_file(path, data)
            return True

        try:
            return self._retry("write", name, put)
        except MISSING as error:
            raise StorageAccessError(f"cannot write {self.url}/{name}: {error}. Create the bucket or folder first") from error

    def replace(self, name: str, data: bytes) -> None:
        """Write an object in place of the one of this name, if there is one: a PUT replaces all of it at once."""
        try:
            self._retry("write", name, lambda fs, path: fs.pipe_file(path, data))
        except MISSING as error:
            raise StorageError(f"cannot write {self.url}/{name}: {error}. Create the bucket or folder first") from error

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""

        def list_names(fs: Any, path: str) -> list[str]:
            try:
                entries = fs.ls(path, detail=False)
            except MISSING:
                return []
            return sorted({entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries if entry.rstrip("/") != path.rstrip("/")})

        return self._retry("list", folder, list_names)

    def size(self, name: str) -> int | None:
        """Size of an object in bytes; None if it does not exist."""
        try:
            info = self._retry("look at", name, lambda fs, path: fs.info(path))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info.get("type") == "file" else None

    def version(self, name: str) -> str:
        """What changes where an object does: its size, and its ETag or time, where the store has one."""
        about = self._retry("look at", name, lambda fs, path: fs.info(path))
        kept = [
            about.get(field) for field in ("size", "ETag", "etag", "md5Hash", "LastModified", "mtime", "created", "commit_hash")
        ]
        return " ".join(str(value) for value in kept if value is not None)

    def age_s(self, name: str) -> float:
        """Seconds since an object was written."""
        written = self._retry("look at", name, _modified)
        return 0.0 if written is None else time.time() - written

    def clock_lead_s(self) -> float:
        """How far this machine's clock is ahead of the store's."""
        name = new_temporary()
        self.write(name, b"")
        try:
            return self.age_s(name)
        finally:
            self.delete(name)

    def delete(self, name: str) -> None:
        """Remove an object."""
        with contextlib.suppress(FileNotFoundError):
            self._retry("delete", name, lambda fs, path: fs.rm_file(path))

    def require_own(self, folder: str) -> None:
        """Nothing to refuse: an object store has no links."""

    def _retry(self, action: str, name: str, do: Callable[[Any, str], _T]) -> _T:
        url, renewed = f"{self.url}/{name}", False
        for attempt in range(1, self.attempts + 1):
            try:
                fs, root = self._filesystem()
                fs.invalidate_cache()
                return do(fs, f"{root}/{name}" if name else root)
            except (*MISSING, ConfigError, StorageAccessError):
                raise
            except Exception as error:
                # Each store's client has errors of its own. Whatever is not known as a refusal may pass.
                cause, hint = cause_of(error)
                if cause is Cause.REFUSED or (cause is Cause.EXPIRED and renewed):
                    raise StorageAccessError(f"cannot {action} {url}: {_words(error)}. {hint}") from error
                if cause is Cause.EXPIRED:  # others may have renewed them in the file or variable that they come from
                    self._opened, renewed = None, True
                    continue
                message = f"cannot {action} {url}, tried {attempt} times: {_words(error)}"
                if attempt == self.attempts:
                    raise StorageError(
                        f"{message}. Nothing is half-written; run the same command again when the store answers"
                    ) from error
                wait_s = self.first_wait_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                _log.warning("%s; retry %d of %d in %.1f s", message, attempt, self.attempts - 1, wait_s)
                time.sleep(wait_s)
        raise AssertionError("the last attempt returns or raises")

    def _filesystem(self) -> tuple[Any, str]:
        """The file system, opened once a process, and the path of the cache in it."""
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                fs, root = _open(self.url)
            except (ConfigError, StorageError, StorageAccessError) as error:
                if self.option == _OPTION:
                    raise
                raise type(error)(str(error).replace(_OPTION, self.option)) from error
            self._opened = (os.getpid(), fs, root.rstrip("/"))
        return self._opened[1], self._opened[2]


def _open(url: str) -> tuple[Any, str]:
    import fsspec

    if "://" not in url:  # a URL that ended in slashes only
        raise ConfigError(f"--cache {url}//: found no folder in this URL, expected one, as in memory://folder")
    try:
        fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True, **_options(url))
    except ImportError as error:
        scheme = url.partition("://")[0]
        if scheme in _PACKAGES:
            raise ConfigError(missing(_PACKAGES[scheme], f"--cache {scheme}://")) from error
        raise ConfigError(f"cannot open --cache {url}: {' '.join(str(error).split())[:300]}") from error
    except OSError as error:
        kind = StorageError if is_resumable(error) else StorageAccessError
        raise kind(f"cannot open --cache {url}: {_words(error)}") from error
    except Exception as error:  # each file system checks its options in its own way
        raise ConfigError(
            f"cannot open --cache {url}: {type(error).__name__}: {error}. Expected a folder, or a URL of a kind that fsspec"
            " knows and whose package is installed (s3:// needs s3fs, gs:// needs gcsfs)"
        ) from error
    if _is_s3(url):
        fs.retries = 1
    return fs, root


def _modified(fs: Any, path: str) -> float | None:
    try:
        return float(fs.modified(path).timestamp())
    except (FileNotFoundError, NotImplementedError):
        return None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _is_s3(url: str) -> bool:
    return url.startswith(("s3://", "s3a://"))


def _options(url: str) -> dict[str, Any]:
    """Only :class:`RemoteStorage` retries: with botocore and s3fs on top, a dead store would be asked 300 times."""
    if not _is_s3(url):
        return {}
    from fsspec.config import conf

    chosen = conf.get("s3", {}).get("config_kwargs", {})
    return {"config_kwargs": {**_S3_CONFIG, **chosen}}

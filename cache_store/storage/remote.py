"""Objects at an fsspec URL."""

import contextlib
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from alignkd.cache_store.storage.contract import MISSING, StorageError

_T = TypeVar("_T")

_S3_CONFIG = {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 1}}


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
            with contextlib.suppress(*MISSING):
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
        except MISSING as error:
            raise StorageError(f"cannot write {self.url}/{name}: {error}. Create the bucket or folder first") from error

    def names(self, folder: str) -> list[str]:
        """Names in a folder."""

        def listed(fs: Any, path: str) -> list[str]:
            try:
                entries = fs.ls(path, detail=False)
            except MISSING:
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
            except (*MISSING, NotImplementedError):
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

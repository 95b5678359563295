"""Objects in a folder of a local or network file system."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from alignkd.cache_store.errors import StorageError
from alignkd.cache_store.storage.contract import MISSING, TEMPORARY


class LocalStorage:
    """A folder of a local or network file system; see :class:`~alignkd.cache_store.storage.contract.Storage`."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(root)

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        with self._wrap_errors("read", name):
            return (self.root / name).read_bytes()

    def write(self, name: str, data: bytes) -> bool:
        """Write a new object; False if the name exists."""
        with self._wrap_errors("write", name):
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
            # Also after a failure: on a full disk the next attempt needs this space.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
        return written

    def names(self, folder: str) -> list[str]:
        """Names in a folder, temporary files included."""
        path = self.root / folder
        with self._wrap_errors("list", folder or "."):
            return sorted(os.listdir(path)) if path.is_dir() else []

    def size(self, name: str) -> int | None:
        """Size of an object in bytes; None if it does not exist."""
        with self._wrap_errors("look at", name):
            path = self.root / name
            return path.stat().st_size if path.is_file() else None

    def age_s(self, name: str) -> float:
        """Seconds since an object was written."""
        with contextlib.suppress(*MISSING), self._wrap_errors("look at", name):
            return time.time() - (self.root / name).stat().st_mtime
        return 0.0

    def delete(self, name: str) -> None:
        """Remove an object."""
        with contextlib.suppress(FileNotFoundError), self._wrap_errors("delete", name):
            (self.root / name).unlink()

    @contextlib.contextmanager
    def _wrap_errors(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, MISSING) and action != "write":
                raise FileNotFoundError(f"{self.root / name} does not exist") from error
            raise StorageError(
                f"cannot {action} {self.root / name}: {error.strerror or error}. Nothing is half-written: fix the cause"
                " (space, quota, permissions), then run the same command again"
            ) from error


def _link(temporary: Path, path: Path) -> bool:
    """Give a written file its final name; False if the name exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links. There the last of two writers at once wins; its object is whole, too.
        if path.exists():
            return False
        os.replace(temporary, path)
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is on disk when it returns.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

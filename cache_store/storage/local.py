"""Objects in a folder of a local or network file system."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from alignkd.cache_store.storage.contract import MISSING, TEMPORARY, StorageError


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
        with contextlib.suppress(*MISSING):
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
            if isinstance(error, MISSING) and deed != "write":
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

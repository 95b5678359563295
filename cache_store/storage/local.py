"""Objects in a folder of a local or network file system."""

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from alignkd.cache_store.errors import StorageAccessError, StorageError, UnusableObjectError
from alignkd.cache_store.storage.contract import MISSING, new_temporary
from alignkd.errors import is_resumable

_log = logging.getLogger(__name__)

# A pipe that nobody writes to would keep a plain open waiting for ever.
_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)

_WITHOUT_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class LocalStorage:
    """A folder of a local or network file system; see :class:`~alignkd.cache_store.storage.contract.Storage`.

    ``root`` may be a link; the folders below it may not, for whoever writes or removes.
    """

    listing_may_lag = True

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.url = str(root)

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """All bytes of an object. Only plain files are opened, and links to plain files."""
        path = self.root / name
        with self._wrap_errors("read", name):
            self._require_plain(path, os.stat(path))
            with open(os.open(path, _READ_FLAGS), "rb") as file:
                found = os.fstat(file.fileno())
                self._require_plain(path, found)
                if at_most is not None and found.st_size > at_most:
                    raise UnusableObjectError(f"{path}: found {found.st_size} bytes, expected at most {at_most} bytes")
                # A file that grows meanwhile is cut off, and then differs from its checksum.
                return file.read(found.st_size)

    @staticmethod
    def _require_plain(path: Path, found: os.stat_result) -> None:
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise UnusableObjectError(f"{path}: found {kind}, expected a plain file")

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """A part of an object."""
        path = self.root / name
        with self._wrap_errors("read", name):
            self._require_plain(path, os.stat(path))
            with open(os.open(path, _READ_FLAGS), "rb") as file:
                self._require_plain(path, os.fstat(file.fileno()))
                file.seek(start)
                return file.read(max(stop - start, 0))

    def write(self, name: str, data: bytes) -> bool:
        """Write a new object; False if the name exists."""
        with self._wrap_errors("write", name):
            self.require_own(os.path.dirname(name))
            return self._write(self.root / name, data)

    def replace(self, name: str, data: bytes) -> None:
        """Write an object in place of the one of this name, if there is one."""
        with self._wrap_errors("write", name):
            self.require_own(os.path.dirname(name))
            self._write(self.root / name, data, replace=True)

    def _write(self, path: Path, data: bytes, *, replace: bool = False) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.parent / new_temporary()
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(temporary, path)
            written = replace or _link(temporary, path)
        finally:
            # Also after a failure: on a full disk the next attempt needs this space.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
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

    def clock_lead_s(self) -> float:
        """How far this machine's clock is ahead of the file server's."""
        name = new_temporary()
        with self._wrap_errors("write", name):
            path = self.root / name
            try:
                path.touch()
                return time.time() - path.stat().st_mtime
            finally:
                path.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Remove an object; a link is removed itself, not what it leads to."""
        path = self.root / name
        with contextlib.suppress(FileNotFoundError), self._wrap_errors("delete", name):
            self.require_own(os.path.dirname(name))
            if path.is_dir() and not path.is_symlink():
                raise StorageAccessError(f"cannot delete {path}: it is a folder. Move it to another place")
            path.unlink()

    def require_own(self, folder: str) -> None:
        """Refuse a folder below the root that is a link, or lies below one."""
        path = self.root
        for part in Path(folder).parts:
            path = path / part
            if part == ".." or path.is_symlink():
                raise StorageAccessError(
                    f"{path} is a link to {os.path.realpath(path)}, expected a folder of its own in {self.root}: nothing is"
                    " written or removed through such a link. Replace it by a folder, or link the folder around it as a whole"
                )

    @contextlib.contextmanager
    def _wrap_errors(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except (StorageError, StorageAccessError):
            raise
        except OSError as error:
            if isinstance(error, MISSING) and action != "write":
                raise FileNotFoundError(f"{self.root / name} does not exist") from error
            kind = StorageError if is_resumable(error) else StorageAccessError
            raise kind(
                f"cannot {action} {self.root / name}: {error.strerror or error}. Nothing is half-written: fix the cause"
                " (space, quota, permissions), then run the same command again"
            ) from error


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk when this returns.

    Some file systems (CIFS, some FUSE) cannot do that for a folder; there it is left out, and said once.
    """
    if os.name == "nt":  # Windows cannot open a folder; its rename is on disk when it returns.
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _WITHOUT_FOLDER_SYNC:
            raise
        _tell_once(folder, error)
    finally:
        os.close(descriptor)


_told: set[int] = set()


def _tell_once(folder: Path, error: OSError) -> None:
    """One warning for a file system."""
    device = os.stat(folder).st_dev
    if device not in _told:
        _told.add(device)
        _log.warning(
            "the file system of %s cannot sync a folder (%s): if the machine loses power, the last files written may lack"
            " their names, and are then made again",
            *(folder, error.strerror),
        )


def _link(temporary: Path, path: Path) -> bool:
    """Give a written file its final name; False if the name exists."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without hard links. There the last of two writers at once wins; its object is whole, too.
        if os.path.lexists(path):
            return False
        os.replace(temporary, path)
    return True

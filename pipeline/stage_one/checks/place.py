"""What can be refused in the first seconds: where the cache is written, and whether there is room for it."""

import os
import shutil
from pathlib import Path

from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.storage import Storage, open_storage
from alignkd.cache_store.storage.contract import new_temporary
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.errors import ConfigError


def check_writable(cache: str) -> None:
    """Refuse a place that cannot be written: a bucket that is not there, credentials without rights, a read-only folder.

    In an object store an object is written and removed; in a folder nothing is, not even the folder.

    Raises:
        ConfigError: a local path that is no folder, or may not be written.
        StorageAccessError: an object store refuses.
    """
    storage = open_storage(cache)
    if not isinstance(storage, LocalStorage):
        probe = new_temporary()
        storage.write(probe, b"")
        storage.delete(probe)
        return
    there = _nearest(storage.root)
    if not there.is_dir():
        raise ConfigError(f"--cache {cache}: {there} is a file, expected a folder: choose another --cache")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--cache {cache}: the folder {there} cannot be written: change its rights, or choose another --cache"
        )


def check_room_to_continue(store: CacheStore) -> None:
    """Refuse to continue a cache whose remaining samples have no room, judged by the samples that are done.

    Raises:
        ConfigError: both sizes, and what to do.
    """
    status = store.status()
    if status.samples_done:
        left = status.samples - status.samples_done - len(status.rejected)
        check_room(store.storage, (status.total_bytes - status.tensor_bytes) * left // status.samples_done)


def check_room(storage: Storage, needed: int) -> None:
    """Refuse a cache for which the file system has no room; object stores have no such limit.

    Raises:
        ConfigError: both sizes, and what to do.
    """
    if not isinstance(storage, LocalStorage):
        return
    free = free_bytes(storage.root)
    if needed > free:
        raise ConfigError(
            f"--cache {storage.url} needs about {_size(needed)} more, but only {_size(free)} are free there: make room, choose"
            " another --cache, or store less: add --dry-run to this command, and it tells what each option saves"
        )


def free_bytes(root: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(_nearest(root)).free


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next(one for one in [path.absolute(), *path.absolute().parents] if one.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"

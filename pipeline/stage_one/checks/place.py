"""What can be refused in the first seconds: where the cache is written, and whether there is room for it."""

import os

from alignkd.cache_store.protocol.store import CacheStore
from alignkd.cache_store.storage import open_storage
from alignkd.cache_store.storage.contract import new_temporary
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.errors import ConfigError
from alignkd.pipeline.cache_admin.room import check_room, nearest


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
    there = nearest(storage.root)
    if not there.is_dir():
        raise ConfigError(f"--cache {cache}: {there} is a file, expected a folder: choose another --cache")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--cache {cache}: the folder {there} cannot be written: change its rights, or choose another --cache"
        )


def check_room_to_continue(store: CacheStore, appended: int = 0) -> None:
    """Refuse to continue a cache whose remaining samples have no room, judged by the samples that are done.

    ``appended``: samples that are not planned yet.

    Raises:
        ConfigError: both sizes, and what to do.
    """
    status = store.status()
    if status.samples_done:
        left = status.samples + appended - status.samples_done - len(status.rejected)
        check_room(store.storage, (status.total_bytes - status.tensor_bytes) * left // status.samples_done)

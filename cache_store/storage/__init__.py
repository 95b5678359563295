"""Where the objects of a cache are stored: a local or network folder, or any fsspec URL.

Every object is written once and never changed, so a name has all of its bytes or does not exist:

* a local file is written under a temporary name, fsynced and linked to its name; then its folder is fsynced;
* a PUT to an object store is atomic by itself.

Failures that may pass (a 500, a timeout, a lost connection) are retried with growing waits; after the last attempt one
:class:`~alignkd.cache_store.errors.StorageError` says what failed. What is refused (no rights, no bucket) is not asked again:
:class:`~alignkd.cache_store.errors.StorageAccessError`. Objects are opened only by names below the cache's root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alignkd.cache_store.storage.contract import Storage
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.cache_store.storage.remote import RemoteStorage

__all__ = ["Storage", "open_storage", "read_all"]

_PARALLEL_READS = 16


def open_storage(url: str | Path) -> Storage:
    """The storage at a local path or an fsspec URL.

    Raises:
        ConfigError: fsspec does not know the URL's scheme, its package is not installed, or its options are wrong.
    """
    text = str(url)
    if text.startswith("file://"):
        return LocalStorage(text.removeprefix("file://"))
    return RemoteStorage(text) if "://" in text else LocalStorage(text)


def read_all(storage: Storage, names: Sequence[str], at_most: int | None = None) -> Iterator[bytes]:
    """The bytes of many small objects, in order; a remote storage reads several in parallel to hide its latency.

    Raises as ``Storage.read``.
    """
    limits = [at_most] * len(names)
    if isinstance(storage, LocalStorage):
        yield from map(storage.read, names, limits)
        return
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        yield from pool.map(storage.read, names, limits)

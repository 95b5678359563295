"""Where a cache lies: a local (or network) folder, or any fsspec URL. Whole objects in, whole objects out.

Every object of a cache is written once and never changed, so a name either gives all of its bytes or does not exist:

* a local file is written under a temporary name, fsynced, linked to its name, and its folder fsynced;
* an object store's PUT is atomic by itself.

Answers that may pass (a 500, a timeout, a lost connection) are asked for again, with longer and longer waits; then one
:class:`StorageError` says what could not be done. Nothing here is opened by anything but a name below the cache's root.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from alignkd.cache_store.storage.contract import Storage
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.cache_store.storage.remote import RemoteStorage

_PARALLEL = 16


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

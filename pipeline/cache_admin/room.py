"""Whether there is room for a cache where it will be written."""

import shutil
from pathlib import Path

from alignkd.cache_store.storage import Storage
from alignkd.cache_store.storage.local import LocalStorage
from alignkd.errors import ConfigError

_STORE_LESS = "choose another --cache, or store less: add --dry-run to this command, and it tells what each option saves"


def check_room(storage: Storage, needed: int, advice: str = _STORE_LESS) -> None:
    """Refuse a cache for which the file system has no room; object stores have no such limit. ``advice``: what else to do.

    Raises:
        ConfigError: both sizes, and what to do.
    """
    if not isinstance(storage, LocalStorage):
        return
    free = free_bytes(storage.root)
    if needed > free:
        raise ConfigError(
            f"{storage.url} needs about {_size(needed)} more, but only {_size(free)} are free there: make room, or {advice}"
        )


def free_bytes(root: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(nearest(root)).free


def nearest(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    return next(one for one in [path.absolute(), *path.absolute().parents] if one.exists())


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e7 else f"{count / 1e3:,.0f} kB"

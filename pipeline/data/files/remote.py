"""Files at fsspec URLs, read through the local cache."""

from functools import lru_cache
from typing import BinaryIO

from alignkd.cache_store.errors import UnusableObjectError
from alignkd.cache_store.storage.remote import RemoteStorage
from alignkd.errors import ConfigError, DataError
from alignkd.models.encoders.image_files import MAX_IMAGE_BYTES, ImageError
from alignkd.pipeline.data.files.local_cache import CopyWriter, local_cache

_BLOCK = 16 * 2**20
_LOCAL = "file://"


def is_remote(place: str) -> bool:
    """Whether a place is a URL; one of ``file://`` is not, see :func:`local_form`."""
    return "://" in place


def local_form(place: str) -> str:
    """A place as it is, a ``file://`` URL as a path.

    Raises:
        ConfigError: several URLs in one, which could lead anywhere.
    """
    if "://" in place and "::" in place:
        raise ConfigError(f"{place}: found several URLs chained with '::', expected one path or URL")
    return place.removeprefix(_LOCAL) if place.startswith(f"{_LOCAL}/") else place


def remote_size(url: str) -> int:
    """Bytes of a file.

    Raises:
        DataError: it is not there.
        TransientError: storage does not answer.
    """
    storage, name = _parts(url)
    size = storage.size(name)
    if size is None:
        raise DataError(f"data file {url}: there is no such file; check the URL")
    return size


def open_remote(url: str) -> BinaryIO:
    """A data file, copied to the local cache as a whole. A file that has changed at its URL is copied again.

    Raises:
        DataError: it is not there, or larger than the local cache.
        TransientError: storage does not answer.
    """
    storage, name = _parts(url)
    size, version = remote_size(url), remote_version(url)

    def copy(writer: CopyWriter) -> None:
        for start in range(0, size, _BLOCK):
            data = storage.read_range(name, start, min(size, start + _BLOCK))
            if len(data) != min(size, start + _BLOCK) - start:
                raise DataError(f"data file {url} changed while it was read; run the same command again")
            writer.write(data)

    return local_cache().open(f"{url}\0{version}", copy)


def remote_version(url: str) -> str:
    """What changes where a file at a URL does: its size, and its ETag or time."""
    storage, name = _parts(url)
    return storage.version(name)


def remote_image(url: str) -> BinaryIO:
    """An image, copied to the local cache.

    Raises:
        ImageError: it is not there, or too large.
        TransientError: storage does not answer.
    """
    storage, name = _parts(url)

    def copy(writer: CopyWriter) -> None:
        try:
            writer.write(storage.read(name, MAX_IMAGE_BYTES))
        except UnusableObjectError as error:
            raise ImageError(str(error)) from error
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ImageError(f"{url}: No such file") from error

    return local_cache().open(url, copy)


def _parts(url: str) -> tuple[RemoteStorage, str]:
    scheme, _, rest = url.partition("://")
    host, _, name = rest.partition("/")
    return _storage(f"{scheme}://{host}"), name


@lru_cache(maxsize=64)
def _storage(root: str) -> RemoteStorage:
    return RemoteStorage(root, option="--data or --images")

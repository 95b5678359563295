"""What every storage offers: objects by name below one root, each written once and whole."""

from typing import Protocol

TEMPORARY = ".tmp-"


MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What an operating system says of a name that is not there."""


class StorageError(OSError):
    """An object could not be read or written; the message says which, why, and what to do."""


class Storage(Protocol):
    """Objects by name (``shards/x.tar``) below one root. FileNotFoundError for a name that is not there."""

    url: str

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        ...

    def write(self, name: str, data: bytes) -> bool:
        """Write an object that was not there, whole or not at all; False, and nothing written, where it was there."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the objects in a folder, without the folder; none where there is no folder. Sorted."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object; None where it is not there."""
        ...

    def age_s(self, name: str) -> float:
        """Seconds since an object was written; 0 where it is gone or nobody knows."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; nothing where it is not there."""
        ...

"""What every storage offers: objects by name below one root, each written once and whole."""

from typing import Protocol

TEMPORARY = ".tmp-"
"""Names of temporary files begin with this."""

MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What an operating system raises for a name that does not exist."""


class Storage(Protocol):
    """Objects by name (``shards/x.tar``) below one root.

    A name that does not exist raises FileNotFoundError; any other failure raises StorageError.
    """

    url: str

    def read(self, name: str) -> bytes:
        """All bytes of an object."""
        ...

    def write(self, name: str, data: bytes) -> bool:
        """Write a new object, whole or not at all. If the name exists, write nothing and return False."""
        ...

    def names(self, folder: str) -> list[str]:
        """Names of the objects in a folder, sorted, without the folder. Empty if the folder does not exist."""
        ...

    def size(self, name: str) -> int | None:
        """Size of an object in bytes; None if it does not exist."""
        ...

    def age_s(self, name: str) -> float:
        """Seconds since an object was written; 0 if it does not exist or the storage does not know."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; does nothing if it does not exist."""
        ...

"""What every storage offers: objects by name below one root, each written once and whole."""

import re
import secrets
from typing import Protocol

TEMPORARY = ".tmp-"
"""Names of temporary files begin with this."""

MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What an operating system raises for a name that does not exist."""

_TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}[0-9a-f]{{16}}")


def new_temporary() -> str:
    """A name for a temporary file that nobody else has."""
    return f"{TEMPORARY}{secrets.token_hex(8)}"


def is_temporary(name: str) -> bool:
    """Whether a name (without its folder) is exactly one of :func:`new_temporary`."""
    return _TEMPORARY_NAME.fullmatch(name) is not None


class Storage(Protocol):
    """Objects by name (``shards/x.tar``) below one root.

    A name that does not exist raises FileNotFoundError. A failure that may pass raises StorageError, any other one
    StorageAccessError. ``listing_may_lag``: an object can exist although :meth:`names` does not tell it, or tells it in
    capital letters: a network file system may answer from memory, and some do not keep the case of names.
    """

    url: str
    listing_may_lag: bool

    def read(self, name: str, at_most: int | None = None) -> bytes:
        """All bytes of an object.

        Raises:
            UnusableObjectError: it is no plain file, or has more than ``at_most`` bytes; nothing is read then.
        """
        ...

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of an object from ``start`` to ``stop`` (exclusive); fewer where the object ends before."""
        ...

    def write(self, name: str, data: bytes) -> bool:
        """Write a new object, whole or not at all. If the name exists, write nothing and return False."""
        ...

    def replace(self, name: str, data: bytes) -> None:
        """Write an object whether the name exists or not. A reader finds all of the old bytes or all of the new ones."""
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

    def clock_lead_s(self) -> float:
        """Seconds that this machine's clock is ahead of the one that dates the storage's objects.

        A temporary object is written and removed to find it. Either clock may be wrong by hours, or be set while a job runs:
        ``age_s(name) - clock_lead_s()`` is the age of an object by one clock alone.
        """
        ...

    def delete(self, name: str) -> None:
        """Remove an object; does nothing if it does not exist."""
        ...

    def require_own(self, folder: str) -> None:
        """Refuse a folder that is a link to another place: nothing is written or removed through it.

        Raises:
            StorageAccessError: it is one.
        """
        ...

"""The errors of a cache. Every message names the object, what was found, what was expected, and what to do."""

from alignkd.errors import AlignkdError, CacheError, TransientError


class FingerprintMismatchError(CacheError):
    """The cache was written with other settings than the requested ones."""


class CorruptShardError(CacheError):
    """A shard is damaged, or does not match its commit record and the fields of the cache."""


class CorruptRecordError(CacheError):
    """A commit record is damaged."""


class DamagedTensorError(CacheError):
    """The object of a tensor is missing, or does not match the manifest."""


class MissingRowError(CacheError):
    """The cache has no row for a key; the message says why."""


class MissingTensorError(CacheError, KeyError):
    """The cache has no tensor of this name; the message lists the names that exist.

    It is a KeyError as well, because :class:`collections.abc.Mapping` expects one.
    """

    def __str__(self) -> str:
        # KeyError would put the message in quotes.
        return str(self.args[0])


class StorageError(OSError, TransientError):
    """An object could not be read or written now; the message says which one, why, and what to do.

    It is not a :class:`CacheError`: a storage that does not answer says nothing about the cache.
    """


class StorageAccessError(OSError, AlignkdError):
    """A storage refuses, and will refuse again: no rights, no credentials, no bucket, a wrong name, a link to elsewhere."""


class UnusableObjectError(StorageAccessError):
    """There is something under an object's name that cannot be one: no plain file, or larger than the object can be."""

"""What a user can act on: every error of alignkd's own, one base class, a few named kinds.

A message says what was found, what was expected, and what to do next. Where others' bytes are read (JSON, YAML,
safetensors, images, configurations of transformers, storage), what those libraries raise is wrapped in one of these; the
command line turns them into one message and exit code 2, or 75 where trying again can help (:func:`is_resumable`). Anything
else is a bug, and keeps its traceback.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class AlignkdError(ValueError):
    """Something that the user can change: an input, a setting, a file."""


class ConfigError(AlignkdError):
    """A setting that is unknown, out of range, or contradicts another."""


class CheckpointError(AlignkdError):
    """A folder that is not a checkpoint this project can load, or whose files are damaged or do not belong together."""


class DataError(AlignkdError):
    """A data file that is missing, damaged, or not in a known format."""


class SampleError(AlignkdError):
    """One sample that cannot be used. Jobs count it, name it, and stop when there are too many."""


class CacheError(AlignkdError):
    """A cache that is missing, damaged, or does not belong to what it is used for."""


class TransientError(AlignkdError):
    """A fault of the surroundings, not of the input: storage that does not answer, a lost worker. Trying again can help."""


_TRANSIENT_ERRNOS = frozenset(
    {
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM),
        *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH),
        *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EPIPE, errno.ESHUTDOWN, errno.ESTALE, errno.ETIMEDOUT),
    }
)
_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed in a moment: network and file server faults, timeouts, too many open files."""
    if isinstance(error, TransientError | TimeoutError | ConnectionError):
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS


def is_resumable(error: BaseException) -> bool:
    """Whether the same command may succeed later: :func:`is_transient`, and disks that are full or became read-only."""
    return is_transient(error) or (isinstance(error, OSError) and error.errno in _FULL_ERRNOS)


@contextmanager
def wrap_errors(kind: type[AlignkdError], message: str, *expected: type[Exception]) -> Iterator[None]:
    """Raise ``kind`` in place of the ``expected`` errors of a library (any error where none is named).

    The new message is ``message``, then the type and the first 300 characters of the library's own.
    Errors of alignkd pass unchanged, and so does :class:`MemoryError`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AlignkdError | MemoryError) or not isinstance(error, expected or Exception):
            raise
        raise kind(f"{message} ({type(error).__name__}: {' '.join(str(error).split())[:300]})") from error

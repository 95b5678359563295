"""What a user can act on: every error of alignkd's own, one base class, a few named kinds.

A message says what was found, what was expected, and what to do next. Where others' bytes are read (JSON, YAML,
safetensors, images, configurations of transformers, storage), what those libraries raise is wrapped in one of these; the
command line turns them into one message and exit code 2. Anything else is a bug, and keeps its traceback.
"""

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

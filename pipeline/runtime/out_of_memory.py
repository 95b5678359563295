"""Recognise the errors that mean that memory ran out, and say so."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from alignkd.errors import TransientError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on a GPU or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("out of memory", "can't allocate memory"))


@contextmanager
def out_of_memory_is_transient() -> Iterator[None]:
    """Raise TransientError where memory runs out in a place that cannot do with less: other processes may hold it.

    Raises:
        TransientError: names the cause.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise TransientError(
            f"memory ran out ({cause}). Nothing is half-written: run the same command again when other processes have given"
            " memory back, or with a smaller --batch-tokens, --shard-samples or --host-threads"
        ) from error

"""What a run cannot write, in one message: what happened, what is kept, and what to do."""

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignkd.errors import AlignkdError, CheckpointError, TransientError

_ADVICE = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "free space there, as your quota is used up",
    errno.EROFS: "have the file system made writable again",
    errno.EACCES: "restore the permission to write there",
    errno.EPERM: "restore the permission to write there",
}
_GONE = (errno.ENOENT, errno.ENOTDIR)
_PROBE_BYTES = 2**20
_TORCH = ("PytorchStreamWriter", "file write failed", "inline_container", "basic_filebuf", "iostream")


@contextmanager
def explained_write_faults(
    folder: Path, what: str, kept: Callable[[], str] = lambda: "", *, again: str = "run the same command again with --resume"
) -> Iterator[None]:
    """Turn the many errors of a disk that is full, read-only, forbidden or gone into one.

    ``kept``: a sentence about what is safe, asked for when it is needed. ``again``: how to go on once the cause is mended.

    Raises:
        TransientError: the same command can go on once the cause is mended.
        CheckpointError: the folder was removed.
    """
    try:
        yield
    except Exception as error:
        number = _errno_of(error, folder)
        if number is None:
            raise
        cause = f"{what} cannot be written to {folder}: {os.strerror(number)}"
        if number in _GONE:
            raise CheckpointError(
                f"{cause}. The folder, or a part of it, was removed while the run was writing there: restore it and"
                f" {again}, or begin again in another --out"
            ) from error
        advice = _ADVICE.get(number, "see that the storage answers")
        safe = f" {kept()}" if kept() else ""
        raise TransientError(f"{cause}.{safe} {advice.capitalize()}, then {again}") from error


def _errno_of(error: Exception, folder: Path) -> int | None:
    """The number of the system's error behind what a library raised; None where there is none."""
    if isinstance(error, AlignkdError):
        return error.__cause__.errno if isinstance(error.__cause__, OSError) else None
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    if found := re.search(r"\(os error (\d+)\)", text):  # safetensors
        return int(found[1])
    if "Parent directory" in text and "does not exist" in text:  # torch
        return errno.ENOENT
    return _probe(folder) if any(known in text for known in _TORCH) else None


def _probe(folder: Path) -> int:
    """Torch does not say why it could not write: try it, and see."""
    probe = folder / f".probe-{secrets.token_hex(8)}"
    try:
        with probe.open("xb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
    return errno.EIO

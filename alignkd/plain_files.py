"""Bytes of plain files alone: no named pipe makes a job wait for ever, no device fills the memory.

A file's size is compared with a limit before anything is read.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
# Without O_NONBLOCK, opening a named pipe waits for a writer. A plain file is read as without it.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)


def open_plain(path: Path) -> BinaryIO:
    """A plain file, or a link to one, opened to read bytes.

    Raises:
        OSError: it cannot be opened, or is a directory, named pipe, socket or device.
        ValueError: no file can have this name.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno == errno.ENXIO:  # what opening a socket gives
            raise OSError(errno.EINVAL, "a socket, expected a plain file", str(path)) from error
        raise
    try:
        kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
        if kind != stat.S_IFREG:
            number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
            raise OSError(number, f"{_KINDS.get(kind, 'something else')}, expected a plain file", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Path, limit: int) -> bytes:
    """The bytes of a plain file of at most ``limit`` bytes.

    Raises:
        OSError: as :func:`open_plain`, or it is larger.
        ValueError: no file can have this name.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than the {limit:,} allowed", str(path))
        data = file.read(size + 1)
        while len(data) > size:  # it has grown since, or is one of those of /proc, which claim to be empty
            size = len(data)
            if size > limit:
                raise OSError(errno.EFBIG, f"more than the {limit:,} bytes allowed", str(path))
            data += file.read(min(size, limit - size) + 1)
        return data

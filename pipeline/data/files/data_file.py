"""A data file to be read at any offset: on this machine, at a URL, or compressed with gzip, which is unpacked once."""

import gzip
import os
import zlib
from pathlib import Path
from typing import BinaryIO

from alignkd.errors import DataError
from alignkd.pipeline.data.files.local_cache import CopyWriter, local_cache
from alignkd.pipeline.data.files.remote import is_remote, open_remote, remote_size, remote_version
from alignkd.pipeline.runtime.retries import with_retries
from alignkd.plain_files import open_plain

_BLOCK = 4 * 2**20
_GZIP = b"\x1f\x8b"


def open_data_file(data: str) -> BinaryIO:
    """The bytes of a data file, unpacked. The caller closes it.

    Raises:
        OSError: a local file cannot be opened.
        DataError: a URL without a file; a compressed file that is damaged, or unpacks to more than the local cache may have.
        TransientError: storage does not answer.
    """
    file = open_remote(data) if is_remote(data) else open_plain(Path(data))
    if file.read(len(_GZIP)) != _GZIP:
        file.seek(0)
        return file
    with file:
        if is_remote(data):
            version = remote_version(data)
        else:
            about = os.fstat(file.fileno())
            version = f"{about.st_size} {about.st_mtime_ns}"
        return local_cache().open(f"unpacked\0{os.path.abspath(data)}\0{version}", lambda writer: _unpack(file, data, writer))


def data_size(data: str) -> int:
    """Bytes of a data file as it lies there, compressed or not.

    Raises:
        DataError: it is not there.
        TransientError: storage does not answer.
    """
    if is_remote(data):
        return remote_size(data)
    try:
        return with_retries(lambda: Path(data).stat().st_size, f"reading data file {data}")
    except OSError as error:
        raise DataError(f"data file {data}: {error.strerror}") from error


def _unpack(file: BinaryIO, data: str, writer: CopyWriter) -> None:
    file.seek(0)
    try:
        with gzip.open(file) as unpacked:
            while block := unpacked.read(_BLOCK):
                writer.write(block)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"data file {data}: its gzip is damaged or cut short ({error}); copy the file again") from error

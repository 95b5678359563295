"""The files of a tar archive: names, and where their bytes lie. Nothing is extracted, and no link is followed.

Headers of the plain form are read here, since an archive of a million samples has millions of them; any other (long names, pax,
sizes from 8 GiB on) is left to ``tarfile``, after its own size was compared with a limit.
"""

import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, cast

from alignkd.errors import DataError

BLOCK = tarfile.BLOCKSIZE
_LARGEST_EXTENSION = 1 << 20
"""Bytes of a long name, or of pax records."""
_PLAIN = b"0\0"
_ADLER_PRIME = 65521


class Member(NamedTuple):
    """A file: its name, where its header begins, where its bytes begin, and how many they are.

    ``regular``: it has bytes of its own; a link, a device or a sparse file has none here.
    """

    name: str
    header: int
    start: int
    size: int
    regular: bool = True

    @property
    def stop(self) -> int:
        """Where its bytes end."""
        return self.start + self.size


def members(file: BinaryIO, size: int, where: str) -> Iterator[Member]:
    """The files of an archive of ``size`` bytes, in their order, links and devices included; ``where`` names it in messages.

    Raises:
        DataError: it is no tar archive, or is cut short or damaged.
    """
    at = 0
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            raise _damaged(where, at, "cut short" if at else "empty")
        if not any(header):
            return
        member = _plain_member(header, at)
        if member is None:
            member, end = _other_member(file, at, where)
        else:
            end = member.stop + -member.size % BLOCK
        if member is not None:
            if member.stop > size:
                raise _damaged(where, at, f"cut short in {member.name!r}, which has {member.size:,} bytes")
            yield member
        at = end


def _plain_member(header: bytes, at: int) -> Member | None:
    """A regular file whose header says all of it; None where it is not one, or its checksum is wrong."""
    if header[156] not in _PLAIN or header[257:262] != b"ustar":
        return None
    try:
        size, checksum = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
        name = header[:100].split(b"\0", 1)[0].decode()
        folder = header[345:500].split(b"\0", 1)[0].decode()
    except ValueError:
        return None
    if not _has_sum(header, checksum) or name.endswith("/"):
        return None
    return Member(f"{folder}/{name}" if folder and header[262:263] == b"\0" else name, at, at + BLOCK, size)


def _has_sum(header: bytes, checksum: int) -> bool:
    """Whether the bytes have this sum, in which the checksum's own field counts as eight spaces.

    The lower half of Adler-32 is that sum plus 1, modulo a prime, and takes a twentieth of the time of adding bytes here.
    """
    total = zlib.adler32(b" " * 8, zlib.adler32(header[156:], zlib.adler32(header[:148]))) & 0xFFFF
    return total == (checksum + 1) % _ADLER_PRIME


def _other_member(file: BinaryIO, at: int, where: str) -> tuple[Member | None, int]:
    """What ``tarfile`` finds at ``at``, None for a folder, and where the next header begins."""
    try:
        file.seek(at)
        archive = tarfile.TarFile(fileobj=cast(BinaryIO, _HeadersAlone(file)))
        info = archive.next()
        if info is None:
            raise _damaged(where, at, "cut short")
        regular = info.isreg() and not info.issparse()
        found = Member(info.name, at, info.offset_data, info.size if regular else 0, regular)
        return (None if info.isdir() else found), archive.offset
    except DataError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise _damaged(where, at, f"no header of a tar archive ({error})") from error


class _HeadersAlone:
    """A file for ``tarfile``, whose header may claim a name or records of any size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > _LARGEST_EXTENSION:
            raise tarfile.HeaderError(f"{size:,} bytes of name or records, at most {_LARGEST_EXTENSION:,} are read")
        return self._file.read(size)


def _damaged(where: str, at: int, why: str) -> DataError:
    return DataError(f"{where}: not a whole tar archive: {why}, at byte {at:,}; copy or download it again")

"""Samples of a WebDataset shard: members of one basename that follow each other, as ``webdataset`` groups them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from alignkd.pipeline.data.readers.archives.members import Member

IMAGE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "jp2", "avif", "heic"})
_META = re.compile(r"__[^/]*__($|/)")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Group:
    """The members of a sample: its key, each member by what follows the key and a dot, and a suffix that comes twice ("").

    ``members`` are in the order of the archive.
    """

    key: str
    members: dict[str, Member]
    twice: str

    @property
    def irregular(self) -> list[str]:
        """Suffixes of members that have no bytes of their own."""
        return [suffix for suffix, member in self.members.items() if not member.regular]

    @property
    def span(self) -> tuple[int, int]:
        """Where the first header begins, and the bytes from there to the end of the last member."""
        first = next(iter(self.members.values())).header
        return first, next(reversed(self.members.values())).stop - first

    @property
    def text(self) -> Member | None:
        """The member KEY.json."""
        return self.members.get("json")

    @cached_property
    def images(self) -> list[Member]:
        """The images in their order: by the number in their suffix (``KEY.0.jpg``, ``KEY.img1.png``), else as they lie."""
        found = [(suffix, member) for suffix, member in self.members.items() if suffix.rpartition(".")[2] in IMAGE_SUFFIXES]
        if len(found) > 1:
            found.sort(key=lambda entry: _number(entry[0]))
        return [member for _, member in found]


def groups(members: Iterable[Member]) -> Iterator[Group]:
    """The samples of an archive; members without a suffix and those named ``__NAME__`` belong to none."""
    key, found, twice = "", dict[str, Member](), ""
    for member in members:
        base, suffix = split_name(member.name)
        if not suffix:
            continue
        if base != key:
            if found:
                yield Group(key, found, twice)
            key, found, twice = base, {}, ""
        if suffix in found:
            twice = suffix
        else:
            found[suffix] = member
    if found:
        yield Group(key, found, twice)


def split_name(name: str) -> tuple[str, str]:
    """The key and the suffix of a member: its last part is cut at its first dot; two empty texts where it has none."""
    if "__" in name and _META.match(name):
        return "", ""
    folder, slash, last = name.rpartition("/")
    base, dot, suffix = last.partition(".")
    return (folder + slash + base, suffix.lower()) if base and dot else ("", "")


def _number(suffix: str) -> int:
    match = _NUMBER.search(suffix.rpartition(".")[0])
    return int(match[0][:18]) if match else 0

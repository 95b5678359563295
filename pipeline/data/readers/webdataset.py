"""WebDataset shards: of each sample the record in its member KEY.json, and its images as members beside it.

The shards are read once for an index: where each sample's members lie. After that a record is one read of a range, and so is an
image. Nothing is extracted, decoded by its extension or unpickled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, BinaryIO, cast

import numpy as np

from alignkd.errors import DataError, SampleError
from alignkd.models.encoders.image_files import MAX_IMAGE_BYTES, ImageError
from alignkd.pipeline.data.contract import Samples, Source
from alignkd.pipeline.data.images.placed import placed
from alignkd.pipeline.data.readers.archives.groups import Group, groups
from alignkd.pipeline.data.readers.archives.members import BLOCK, Member, members
from alignkd.pipeline.data.readers.archives.places import COLUMNS, Place, TarPlaces, place_at
from alignkd.pipeline.data.readers.archives.records import check_group, digests, names_images, tar_record, with_digests
from alignkd.pipeline.data.readers.files.shard_file import ShardFile
from alignkd.pipeline.data.readers.files.shard_names import shard_names
from alignkd.pipeline.data.readers.key_index import KeyIndex
from alignkd.pipeline.data.records import LARGEST_RECORD
from alignkd.pipeline.data.sample import Sample, faulty_sample, read_sample

_SCHEME = "tar:"
_FETCHED = 1 << 20
"""Bytes of a sample in a remote shard that are fetched at once."""


def open_source(source: Source) -> Samples:
    """As :meth:`alignkd.pipeline.data.contract.Reader.open_source`."""
    return WebDatasetSamples(source)


def known_source(source: Source, keys: np.ndarray, locators: Mapping[str, np.ndarray]) -> Samples | None:
    """As :meth:`alignkd.pipeline.data.contract.Reader.known_source`."""
    return WebDatasetSamples(source, keys, locators) if set(COLUMNS) <= locators.keys() else None


def size(source: Source) -> int:
    """As :meth:`alignkd.pipeline.data.contract.Reader.size`."""
    return sum(ShardFile(name).size() for name in shard_names(source.data, (".tar",)))


class WebDatasetSamples(Samples):
    """The samples of WebDataset shards, in the order of the shards and of the members in them.

    ``keys`` and ``places`` are what an earlier reading found; without them the shards are read as a whole.

    Raises:
        DataError: a shard cannot be read or is damaged, or none of the records can be read.
        TransientError: storage does not answer.
    """

    def __init__(self, source: Source, keys: np.ndarray | None = None, places: Mapping[str, np.ndarray] | None = None) -> None:
        self.path, self.source = source.data, source
        self.shards = [ShardFile(name) for name in shard_names(source.data, (".tar",))]
        if keys is not None and places is not None:
            self.keys, self._places = keys, dict(places)
        else:
            self._index()

    def _index(self) -> None:
        index, places = KeyIndex(), TarPlaces()
        for number, shard in enumerate(self.shards):
            for group, text in _groups_of(shard):
                sample, found = _read(shard, group, text, self.source.merge_turns)
                index.add(sample)
                places.add(number, group, not sample.fault, found)
        index.check(f"data {self.path}", "samples in the members KEY.json")
        self.faults, self.keys = index.faults, index.keys
        self.image_hashes, self.image_counts = index.image_hashes, index.image_counts
        self._places = places.arrays()

    def locators(self) -> dict[str, np.ndarray]:
        """Shard, byte offsets and lengths of the text and of all members, and the number of images among these."""
        return dict(self._places)

    @property
    def image_space(self) -> str:
        """The image folder where no image lies in a shard, else the shards."""
        return str(self.path) if self._places["members"].any() else str(self.source.images)

    @property
    def sizes(self) -> np.ndarray:
        """Bytes of each record."""
        return self._places["lengths"]

    def __getitem__(self, index: int) -> Sample:
        place = place_at(self._places, index)
        if not 0 <= place.shard < len(self.shards):
            raise self._changed(index, place)
        shard = self.shards[place.shard]
        sample = self._sample(shard, place)
        if sample.key != self.key(index):
            raise self._changed(index, place)
        if not place.members:
            return placed(sample, self.source)
        span, length = place.span
        images = tuple(f"{_SCHEME}{number}:{span}+{length}:{shard.name}" for number in range(len(sample.images)))
        return replace(sample, source=self.source.name, places=images)

    def _sample(self, shard: ShardFile, place: Place) -> Sample:
        if place.length:
            try:
                record = tar_record(shard.read(place.start, place.length))
                if names_images(record) or not place.members or place.digests:
                    named = record if names_images(record) else with_digests(record, place.digests)
                    return read_sample(named, merge_turns=self.source.merge_turns)
            except SampleError:
                pass  # it had none when it was indexed: the key will differ
        group = _Span(shard, place.span).group()
        text = shard.read(group.text.start, group.text.size) if group.text and group.text.size <= LARGEST_RECORD else b""
        return _read(shard, group, text, self.source.merge_turns)[0]

    def _changed(self, index: int, place: Place) -> DataError:
        name = self.shards[place.shard].name if 0 <= place.shard < len(self.shards) else self.path
        return DataError(
            f"data file {name}, the sample at byte {place.span[0]}: the file has changed since it was indexed; restore it, or"
            " write another cache"
        )


def read_image(place: str) -> bytes:
    """The bytes of an image in a shard.

    Raises:
        ImageError: it is too large, or no longer there.
        DataError: the shard cannot be read.
    """
    number, span, name = place.removeprefix(_SCHEME).split(":", 2)
    start, _, length = span.partition("+")
    shard = _shard(name)
    members_of = _Span(shard, (int(start), int(length)))
    images = members_of.group().images
    if int(number) >= len(images):
        raise ImageError(f"{name}: there is no image {number} in the sample at byte {start}: the file has changed")
    member = images[int(number)]
    if member.size > MAX_IMAGE_BYTES:
        raise ImageError(f"{name}, {member.name}: {member.size:,} bytes, more than the {MAX_IMAGE_BYTES:,} allowed")
    return members_of.bytes_of(member)


@lru_cache(maxsize=1024)
def _shard(name: str) -> ShardFile:
    return ShardFile(name)


def _groups_of(shard: ShardFile) -> Iterator[tuple[Group, bytes]]:
    """The samples of a shard, in their order, with the text of KEY.json (empty where there is none, or it is too large)."""
    length = shard.size()
    with shard.open() as file:
        texts: dict[int, bytes] = {}
        for group in groups(_with_texts(members(file, length, f"data file {shard.name}"), file, texts)):
            yield group, texts.pop(group.text.start, b"") if group.text else b""


def _with_texts(found: Iterator[Member], file: BinaryIO, texts: dict[int, bytes]) -> Iterator[Member]:
    """Read each JSON member while the file stands at it: going back to it costs another read."""
    for member in found:
        if member.name[-5:].lower() == ".json" and member.regular and member.size <= LARGEST_RECORD:
            file.seek(member.start)
            texts[member.start] = file.read(member.size)
        yield member


def _read(shard: ShardFile, group: Group, text: bytes, merge_turns: bool) -> tuple[Sample, list[str]]:
    """The sample of a group of members, and the digests that its images are known by; one that cannot be read has a fault."""
    record: Any = None
    try:
        check_group(group)
        record = tar_record(text)
        found = [] if names_images(record) else digests(group, lambda start, stop: shard.read(start, stop - start))
        sample = read_sample(with_digests(record, found), merge_turns=merge_turns)
        if group.images and sample.images and len(sample.images) != len(group.images):
            raise SampleError(f"KEY.json names {len(sample.images)} images, and {len(group.images)} lie beside it")
        return sample, found
    except SampleError as error:
        name = f" (id {record['id']!r:.80})" if isinstance(record, dict) and "id" in record else ""
        where = f"data file {shard.name}, sample {group.key!r}{name}"
        content = text or group.key.encode("utf-8", "surrogateescape")
        return faulty_sample(record, content, f"{where}: {error}"), []


class _Span:
    """The bytes of one sample's members, as a file of their own; those of a remote shard are fetched in few requests."""

    def __init__(self, shard: ShardFile, span: tuple[int, int]) -> None:
        self.shard, (self.start, self.length) = shard, span
        self._head = b"" if shard.local else shard.read(self.start, min(self.length, _FETCHED))
        self._at = 0

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        """Zeros follow the last member, as they end an archive."""
        at, size = self._at, min(size, max(self.length - self._at, 0)) if self._at < self.length else 0
        found = self._bytes(at, size) if size else bytes(BLOCK)
        self._at += len(found)
        return found

    def group(self) -> Group:
        """The sample, by the headers of its members alone.

        Raises:
            DataError: there is none: the file has changed.
        """
        where = f"data file {self.shard.name}, from byte {self.start:,} on"
        found = next(groups(members(cast(BinaryIO, self), self.length, where)), None)
        if found is None:
            raise DataError(f"{where}: there is no sample: the file has changed since it was indexed")
        moved = {
            suffix: member._replace(header=member.header + self.start, start=member.start + self.start)
            for suffix, member in found.members.items()
        }
        return replace(found, members=moved)

    def bytes_of(self, member: Member) -> bytes:
        """The bytes of a member of :meth:`group`."""
        return self._bytes(member.start - self.start, member.size)

    def _bytes(self, at: int, size: int) -> bytes:
        if at + size <= len(self._head):
            return self._head[at : at + size]
        return self.shard.read(self.start + at, size)

"""The samples of several data, one after the other."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from alignkd.pipeline.data.authors import joined
from alignkd.pipeline.data.contract import NO_IMAGE, Samples, Source
from alignkd.pipeline.data.sample import Sample

Known = Callable[[Source, np.ndarray, Mapping[str, np.ndarray]], Samples | None]

_FILES = "files"
"""The locator that says which of the data a sample is in, by its number."""
_NONE = -1
"""The value of a locator that the reader of a sample does not have."""


class MixedSamples(Samples):
    """The samples of several data. ``part_of``: which of them each is in; ``inside``: its index there; both ``[N]``."""

    def __init__(
        self,
        sources: Sequence[Source],
        parts: Sequence[Samples],
        part_of: np.ndarray | None = None,
        inside: np.ndarray | None = None,
    ) -> None:
        assert len(sources) == len(parts)
        lengths = [len(part) for part in parts]
        self.sources, self.parts, self.path = tuple(sources), list(parts), ", ".join(str(part.path) for part in parts)
        self.part_of = np.repeat(np.arange(len(parts)), lengths) if part_of is None else part_of
        self.inside = np.concatenate([np.arange(length) for length in lengths]) if inside is None else inside
        self.faults = sum(part.faults for part in parts)
        self.keys = np.concatenate([part.keys for part in parts])[self._order]
        if all(part.image_hashes is not None and part.image_counts is not None for part in parts):
            self.image_hashes = np.concatenate(self._hashes())[self._order]
            counts = [part.image_counts for part in parts if part.image_counts is not None]
            self.image_counts = np.concatenate(counts)[self._order]
        self.authors = joined(parts, self._order)

    @property
    def _order(self) -> np.ndarray:
        """The place of each sample where the parts follow each other."""
        starts = np.cumsum([0, *(len(part) for part in self.parts[:-1])])
        order: np.ndarray = starts[self.part_of] + self.inside
        return order

    def _hashes(self) -> list[np.ndarray]:
        """Hashes of images that tell two pictures of one name in two folders apart."""
        spaces, found = [part.image_space for part in self.parts], list[np.ndarray]()
        for part, space in zip(self.parts, spaces, strict=True):
            assert part.image_hashes is not None
            salt = _number(space) if len(set(spaces)) > 1 else 0
            hashes = part.image_hashes
            found.append(np.where(hashes == NO_IMAGE, np.uint64(NO_IMAGE), hashes ^ np.uint64(salt)))
        return found

    def __getitem__(self, index: int) -> Sample:
        return self.parts[int(self.part_of[index])][int(self.inside[index])]

    def locators(self) -> dict[str, np.ndarray]:
        """Those of all readers; -1 where a reader has none of this name. ``files``: which of the data a sample is in."""
        parts = [part.locators() for part in self.parts]
        names = dict.fromkeys(name for locators in parts for name in locators)
        whole = {
            name: np.concatenate(
                [
                    locators.get(name, np.full(len(part), _NONE, dtype="<i8"))
                    for part, locators in zip(self.parts, parts, strict=True)
                ]
            )[self._order]
            for name in names
        }
        return {_FILES: self.part_of.astype("<i8"), **whole}

    @property
    def weights(self) -> np.ndarray | None:
        """The weight of each sample's dataset."""
        weights = np.array([source.weight for source in self.sources])
        return None if (weights == 1).all() else weights[self.part_of]

    @property
    def sizes(self) -> np.ndarray:
        """Those of the parts."""
        sizes: np.ndarray = np.concatenate([part.sizes for part in self.parts])[self._order]
        return sizes

    @property
    def named_sources(self) -> tuple[list[str], np.ndarray]:
        """The names of the datasets, and which of them each sample is of, ``[N]``."""
        return [source.name for source in self.sources], self.part_of


def _number(space: str) -> int:
    return int.from_bytes(hashlib.blake2b(space.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def known_mixture(
    sources: Sequence[Source], keys: np.ndarray, locators: Mapping[str, np.ndarray], known: Known
) -> MixedSamples | None:
    """Samples of known keys in the places of :meth:`MixedSamples.locators`; None where these are of other data.

    ``known``: samples of one of them, as :meth:`alignkd.pipeline.data.contract.Reader.known_source` gives them.
    """
    part_of = locators.get(_FILES)
    if part_of is None or part_of.min() < 0 or part_of.max() >= len(sources):
        return None
    parts, inside = list[Samples](), np.empty(len(keys), dtype=np.int64)
    for number, source in enumerate(sources):
        mine = np.flatnonzero(part_of == number)
        own = {name: places[mine] for name, places in locators.items() if name != _FILES}
        part = known(source, keys[mine], {name: places for name, places in own.items() if (places != _NONE).all()})
        if part is None:
            return None
        parts.append(part)
        inside[mine] = np.arange(len(mine))
    return MixedSamples(sources, parts, part_of, inside)

"""What every reader of data gives: samples by index, each with a content key, and never the whole data in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from alignkd.pipeline.data.provenance import Author
from alignkd.pipeline.data.sample import Sample

NO_IMAGE = 0
"""The image hash of a sample without images."""


@dataclass(frozen=True)
class Authors:
    """Who wrote the answers of N samples: ``number_of`` ``[N]`` are places in ``names``."""

    names: tuple[Author, ...]
    number_of: np.ndarray

    def select(self, order: np.ndarray) -> Authors:
        """Those of some samples."""
        return Authors(self.names, self.number_of[order])


@dataclass(frozen=True)
class Source:
    """One of the data that a job reads.

    ``data``: a file, a folder or a URL, as the user gave it. ``images``: the folder or URL that image references are relative
    to. ``name``: of the dataset in a mixture. ``weight``: how often an epoch of training takes its samples. ``limit``: read the
    first so many alone.
    """

    data: str
    images: str | None = None
    name: str = ""
    weight: float = 1.0
    limit: int | None = None
    merge_turns: bool = False


class Samples(ABC):
    """Random access to samples, by index; safe between threads, and can be sent to worker processes.

    ``path``: the data, for messages. ``keys``: uint8 ``[N, 16]``. ``faults``: records that cannot be read; each is a sample
    with a ``fault``. ``image_hashes``: uint64 ``[N]``, equal for samples of the same images, :data:`NO_IMAGE` without one;
    ``image_counts``: ``[N]``; both None where a plan says where samples are and nothing was indexed. ``authors``: who wrote
    the answers of each, None where only the samples themselves say it (:func:`alignkd.pipeline.data.authors.authors_of`).
    """

    path: object
    keys: np.ndarray
    faults: int = 0
    image_hashes: np.ndarray | None = None
    image_counts: np.ndarray | None = None
    authors: Authors | None = None

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at an index; one whose record cannot be read has a ``fault``.

        Raises:
            DataError: the data has changed since it was indexed, or is not there.
            TransientError: storage does not answer.
        """

    @abstractmethod
    def locators(self) -> dict[str, np.ndarray]:
        """Where each sample is, as integer arrays of ``[N]`` by name: what a reader needs to find it without an index."""

    @property
    def image_space(self) -> str:
        """Within what image references are unique: the same reference in two spaces is two pictures."""
        return str(self.path)

    @property
    def weights(self) -> np.ndarray | None:
        """How often an epoch takes each sample, float64 ``[N]``; None where all are taken once."""
        return None

    @property
    def sizes(self) -> np.ndarray:
        """About how long each sample is, ``[N]``, for batches of like lengths; zeros where nothing is known."""
        return np.zeros(len(self), dtype=np.int64)

    @property
    def named_sources(self) -> tuple[list[str], np.ndarray] | None:
        """The names of the datasets, and which of them each sample is of, ``[N]``; None where there is one without a name."""
        return None

    @property
    def counts(self) -> dict[str, int]:
        """Samples by the name of their dataset; empty where there is one without a name."""
        if self.named_sources is None:
            return {}
        names, of_sample = self.named_sources
        return dict(zip(names, np.bincount(of_sample, minlength=len(names)).tolist(), strict=True))

    @property
    def datasets(self) -> str:
        """:attr:`counts` as words of a log; empty where there is one without a name."""
        return ", ".join(f"{name} {count:,}" for name, count in self.counts.items())

    def __len__(self) -> int:
        return len(self.keys)

    def key(self, index: int) -> str:
        """The key of sample ``index``, without reading it."""
        raw: bytes = self.keys[index].tobytes()
        return raw.hex()

    def unique(self) -> np.ndarray:
        """Indices of the first sample of each key, in the order of the data: identical samples share a row."""
        halves = np.ascontiguousarray(self.keys).view(">u8").reshape(-1, 2).astype(np.uint64)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        # lexsort is stable, so the first of equal keys is the first in the data.
        new = np.r_[True, (halves[order][1:] != halves[order][:-1]).any(axis=1)]
        return np.sort(order[new])

    def by_image(self) -> np.ndarray:
        """The indices of :meth:`unique`, with samples of the same images moved to the first of them.

        A cache then stores per-image data once, or twice where a shard ends between two such samples.
        """
        assert self.image_hashes is not None, "by_image needs samples that were indexed: not those that a plan locates"
        order = self.unique()
        hashes = self.image_hashes[order]
        _, first, image = np.unique(hashes, return_index=True, return_inverse=True)
        group = np.where(hashes == NO_IMAGE, np.arange(len(order)), first[image])
        return order[np.argsort(group, kind="stable")]

    def select(self, order: np.ndarray) -> Samples:
        """Some of these samples, in this order of indices."""
        return SelectedSamples(self, order)


class SelectedSamples(Samples):
    """Some samples of others, in another order."""

    def __init__(self, samples: Samples, order: np.ndarray) -> None:
        self.samples, self.order, self.path = samples, order, samples.path
        self.keys = samples.keys[order]
        self.image_hashes = None if samples.image_hashes is None else samples.image_hashes[order]
        self.image_counts = None if samples.image_counts is None else samples.image_counts[order]
        self.authors = None if samples.authors is None else samples.authors.select(order)
        # Which records have a fault is known when they are read: of a part, at most as many as of the whole.
        self.faults = min(samples.faults, len(order))

    def __getitem__(self, index: int) -> Sample:
        return self.samples[int(self.order[index])]

    def locators(self) -> dict[str, np.ndarray]:
        """Those of the samples that were selected."""
        return {name: places[self.order] for name, places in self.samples.locators().items()}

    @property
    def image_space(self) -> str:
        """That of all samples."""
        return self.samples.image_space

    @property
    def weights(self) -> np.ndarray | None:
        """Those of the samples that were selected."""
        weights = self.samples.weights
        return None if weights is None else weights[self.order]

    @property
    def sizes(self) -> np.ndarray:
        """Those of the samples that were selected."""
        sizes: np.ndarray = self.samples.sizes[self.order]
        return sizes

    @property
    def named_sources(self) -> tuple[list[str], np.ndarray] | None:
        """Those of the samples that were selected."""
        found = self.samples.named_sources
        return None if found is None else (found[0], found[1][self.order])


class Reader(Protocol):
    """What the module of a reader has."""

    def open_source(self, source: Source) -> Samples:
        """Index the data: every sample is read once, and gets its key.

        Raises:
            DataError: it cannot be read, is not in this reader's format, or holds no record that can be read.
            TransientError: storage does not answer.
        """
        ...

    def known_source(self, source: Source, keys: np.ndarray, locators: Mapping[str, np.ndarray]) -> Samples | None:
        """Samples of known keys ``[N, 16]`` in known places; each is compared with its key when it is read.

        None where ``locators`` are not those of this reader.
        """
        ...

    def size(self, source: Source) -> int:
        """Bytes of all files of the data, which tell one state of it from another.

        Raises:
            DataError: it is not there.
            TransientError: storage does not answer.
        """
        ...

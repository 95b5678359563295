"""Several caches of one teacher, read as one: the shards of each follow those of the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.protocol.further_plans import GrownPlan
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.protocol.shard_cache import ShardCache
from alignkd.cache_store.rows.checks import RowChecks
from alignkd.cache_store.rows.shard import Shard
from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.errors import CacheError, ConfigError


def are_alike(one: CacheReader, other: CacheReader) -> bool:
    """Whether two caches differ in their samples alone: fields, fingerprint without ``data``, and tensors are the same."""
    return _without_data(one.spec) == _without_data(other.spec) and one.tensors.entries == other.tensors.entries


def unite(readers: Sequence[CacheReader], weights: Sequence[float], *, max_shards: int) -> list[tuple[CacheReader, float]]:
    """Caches of the same teacher as one, where they have the same weight and no sample in common; the others as they are."""
    groups: list[tuple[list[CacheReader], float]] = []
    for reader, weight in zip(readers, weights, strict=True):
        for group, of_group in groups:
            apart = all((one.plan.locate(reader.plan.keys) < 0).all() for one in group)
            if of_group == weight and are_alike(group[0], reader) and apart:
                group.append(reader)
                break
        else:
            groups.append(([reader], weight))
    return [(UnitedReader(group, max_shards=max_shards) if len(group) > 1 else group[0], weight) for group, weight in groups]


def _without_data(spec: CacheSpec) -> tuple[object, object]:
    fields = {field["name"]: field for field in spec.to_dict()["fields"]}
    return fields, {name: value for name, value in spec.fingerprint.items() if name != "data"}


class UnitedReader(CacheReader):
    """The rows of caches that are :func:`alike <are_alike>`; none of their samples is in two of them.

    Raises:
        ConfigError: ``max_shards`` below 1.
        CacheError: a sample is in two of the caches.
    """

    def __init__(self, readers: Sequence[CacheReader], *, max_shards: int = 8) -> None:
        if max_shards < 1:
            raise ConfigError(f"shards to keep in memory: found {max_shards}, expected at least 1")
        first = readers[0]
        assert all(are_alike(first, reader) for reader in readers), "caches of one teacher"
        self.readers = list(readers)
        self.storage, self.spec, self.shard_format, self.tensors = first.storage, first.spec, first.shard_format, first.tensors
        try:
            self.plan = GrownPlan([reader.plan for reader in readers])
        except CacheError as error:
            raise CacheError(
                f"the caches at {self.url} have samples in common ({error}): join them with alignkd cache merge, and give that"
                " one"
            ) from error
        self.starts = np.cumsum([0, *(reader.plan.shards for reader in readers)])
        self.max_shards = max_shards
        self.records = {
            int(start) + number: dataclasses.replace(record, number=int(start) + number)
            for start, reader in zip(self.starts, readers, strict=False)
            for number, record in reader.records.items()
            if number < reader.plan.shards
        }
        self.rejected = {key: sample for reader in readers for key, sample in reader.rejected.items()}
        self._fields = {field.name: field for field in self.spec.fields}
        self._checks = RowChecks(self.spec)
        self._checked = {}
        self._shards = ShardCache(self._fetch, max_shards)

    def _fetch(self, number: int) -> Shard:
        place = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.readers[place]._fetch(number - int(self.starts[place]))

    @property
    def url(self) -> str:
        """Where the caches are."""
        return ", ".join(reader.url for reader in self.readers)

    def again(self, *, max_shards: int) -> UnitedReader:
        """As :meth:`CacheReader.again`, of all caches."""
        return UnitedReader([reader.again(max_shards=1) for reader in self.readers], max_shards=max_shards)

    def first_dimensions(self, field: str) -> NDArray[np.int32]:
        """As :meth:`CacheReader.first_dimensions`, for the samples of all caches."""
        return np.concatenate([reader.first_dimensions(field) for reader in self.readers])

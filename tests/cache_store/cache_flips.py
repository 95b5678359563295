"""Random damage to every object of a cache, and whether it is found; ``benchmarks/damage/flips.py`` does more of the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cache_samples import TENSORS, all_names, fill, key_of, make_store

from alignkd.cache_store.errors import CorruptShardError, DamagedTensorError
from alignkd.cache_store.protocol.maintenance.verify import verify
from alignkd.cache_store.protocol.names import shard_number
from alignkd.cache_store.protocol.reader import CacheReader
from alignkd.cache_store.storage import open_storage


@dataclass(frozen=True)
class Damage:
    """One object of which one bit is flipped, or all from a byte on is cut off."""

    name: str
    at: int
    bit: int | None

    def of(self, data: bytes) -> bytes:
        if self.bit is None:
            return data[: self.at]
        changed = bytearray(data)
        changed[self.at] ^= 1 << self.bit
        return bytes(changed)


def small_cache(folder: Path, shard_format: str) -> Path:
    """Two shards of two samples, one of them rejected, two tensors, and the record of a run."""
    store = make_store(folder, samples=4, shard_samples=2, shard_format=shard_format, tensors=TENSORS)
    fill(store, reject=(3,)).write_run({"seed": 1})
    assert verify(folder).problems == []
    return folder


def random_damages(cache: Path, count: int, seed: int) -> list[Damage]:
    """Three flips to a truncation, each object as often as another."""
    rng = np.random.default_rng(seed)
    names = all_names(open_storage(cache))
    picked = [names[i] for i in rng.permutation(np.arange(count) % len(names))]
    return [
        Damage(name, int(rng.integers((cache / name).stat().st_size)), None if rng.random() < 0.25 else int(rng.integers(8)))
        for name in picked
    ]


def is_found(cache: Path, damage: Damage) -> bool:
    """Whether the audit names the damage, and reading refuses a damaged tensor or the rows of a shard; then undoes it."""
    file = cache / damage.name
    data = file.read_bytes()
    file.write_bytes(damage.of(data))
    try:
        return _audit_finds(cache, damage) and _reading_refuses(cache, damage)
    finally:
        file.write_bytes(data)


def _audit_finds(cache: Path, damage: Damage) -> bool:
    try:
        problems = verify(cache).problems
    except ValueError as error:
        return damage.name in str(error)
    return any(damage.name in problem.objects for problem in problems)


def _reading_refuses(cache: Path, damage: Damage) -> bool:
    if damage.name.startswith("tensors/"):
        return _tensor_refused(cache, damage.name)
    number = shard_number(damage.name)
    if number is None:
        return True
    reader = CacheReader(cache)
    keys = [key for key in map(key_of, range(4)) if key in reader and reader.shard_of(key) == number]
    return bool(keys) and all(_refused(reader, key) for key in keys)


def _tensor_refused(cache: Path, name: str) -> bool:
    tensors = CacheReader(cache).tensors
    (named,) = (entry.name for entry in tensors.entries.values() if entry.object == name)
    try:
        tensors[named]
    except DamagedTensorError:
        return True
    return False


def _refused(reader: CacheReader, key: str) -> bool:
    try:
        reader.row(key)
    except CorruptShardError:
        return True
    return False

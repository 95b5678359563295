"""Which sample is in which shard: decided once, before the first shard is written, and never again."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.rows.spec import plain_json
from alignkd.cache_store.storage.contract import Storage

FOLDER = "plan"


@dataclass(frozen=True)
class Plan:
    """``keys`` uint8 [samples, 16] in order, ``shard_samples`` of them to a shard; ``meta`` is the planner's own.

    ``extras`` are arrays of the planner, one entry a sample: where to find each sample again, for example.
    ValueError for other arrays, for no samples, for fewer than one to a shard, and for a key that comes twice.
    """

    keys: NDArray[np.uint8]
    shard_samples: int
    meta: Mapping[str, Any]
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", plain_json(self.meta))
        if self.keys.dtype != np.uint8 or self.keys.ndim != 2 or self.keys.shape[1] != 16:
            raise ValueError(f"keys: found {self.keys.dtype} {list(self.keys.shape)}, expected uint8 [samples, 16]")
        if not len(self.keys):
            raise ValueError("a plan without samples: found none in the data file, expected at least one")
        if self.shard_samples < 1:
            raise ValueError(f"samples per shard: found {self.shard_samples}, expected at least 1")
        if any(len(array) != self.samples for array in self.extras.values()):
            raise ValueError("extra arrays of a plan hold one entry a sample")
        repeated = self._repeated()
        if repeated:
            raise ValueError(f"{repeated} of {len(self.keys)} keys are repeated: plan identical samples once")

    def _repeated(self) -> int:
        # Keys that begin alike are rare, and the only ones that can be the same.
        prefixes, order = self._by_prefix
        alike = np.flatnonzero(prefixes[1:] == prefixes[:-1])
        suspects = self.keys[order[np.union1d(alike, alike + 1)]]
        return len(suspects) - len(np.unique(suspects, axis=0)) if len(suspects) else 0

    @property
    def samples(self) -> int:
        """Number of planned samples."""
        return len(self.keys)

    @property
    def shards(self) -> int:
        """Number of planned shards; the last may be shorter."""
        return -(-self.samples // self.shard_samples)

    def positions_of(self, shard: int) -> range:
        """Places in the plan of a shard's samples."""
        assert 0 <= shard < self.shards
        return range(shard * self.shard_samples, min((shard + 1) * self.shard_samples, self.samples))

    def keys_of(self, shard: int) -> list[str]:
        """Keys of a shard, in the order of the plan."""
        positions = self.positions_of(shard)
        text = self.keys[positions.start : positions.stop].tobytes().hex()
        return [text[i : i + 32] for i in range(0, len(text), 32)]

    def locate(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Place in the plan of each key ``[N, 16]``; -1 where it is not planned."""
        prefixes, order = self._by_prefix
        wanted = np.ascontiguousarray(keys).view(">u8")[:, 0].astype(np.uint64)
        found = np.full(len(keys), -1, dtype=np.int64)
        at = np.searchsorted(prefixes, wanted)
        # Eight bytes name a key but for a coincidence; the rest of a run of equal ones is tried as well.
        open_ = np.flatnonzero(at < len(prefixes))
        while len(open_):
            open_ = open_[prefixes[at[open_]] == wanted[open_]]
            here = order[at[open_]]
            same = (self.keys[here] == keys[open_]).all(axis=1)
            found[open_[same]] = here[same]
            open_ = open_[~same]
            at[open_] += 1
            open_ = open_[at[open_] < len(prefixes)]
        return found

    def shard_of(self, key: str) -> int | None:
        """The shard that a key is planned for; None where it is not planned."""
        position = int(self.locate(np.frombuffer(bytes.fromhex(key), np.uint8)[None])[0])
        return None if position < 0 else position // self.shard_samples

    @cached_property
    def _by_prefix(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        prefixes = np.ascontiguousarray(self.keys).view(">u8")[:, 0].astype(np.uint64)
        order = np.argsort(prefixes, kind="stable")
        return prefixes[order], order

    def summary(self) -> dict[str, Any]:
        """What makes two plans the same, and the objects that hold its arrays."""
        return {
            "samples": self.samples,
            "shard_samples": self.shard_samples,
            "arrays": {name: hashlib.sha256(_bytes(array)).hexdigest() for name, array in self._arrays.items()},
            "meta": self.meta,
        }

    @property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        assert "keys" not in self.extras
        return {"keys": self.keys, **self.extras}

    def write(self, storage: Storage) -> None:
        """Write each array as ``plan/NAME-HASH.npy``."""
        for name, array in self._arrays.items():
            data = _bytes(array)
            storage.write(_object(name, hashlib.sha256(data).hexdigest()), data)

    @classmethod
    def load(cls, storage: Storage, summary: Mapping[str, Any]) -> Plan:
        """The plan of a summary; ValueError where an array is missing or damaged."""
        try:
            arrays = {name: _read(storage, name, digest) for name, digest in summary["arrays"].items()}
            return cls(arrays.pop("keys"), summary["shard_samples"], summary["meta"], arrays)
        except (AttributeError, FileNotFoundError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the plan of the cache at {storage.url} cannot be read ({error}):"
                " restore the folder plan/ from a copy, or write a new cache"
            ) from error


def plan_objects(summary: Mapping[str, Any]) -> list[str]:
    """Names of the objects that hold a plan."""
    return [_object(name, digest) for name, digest in summary["arrays"].items()]


def _object(name: str, digest: str) -> str:
    return f"{FOLDER}/{name}-{digest[:12]}.npy"


def _read(storage: Storage, name: str, digest: str) -> NDArray[Any]:
    data = storage.read(_object(name, digest))
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{_object(name, digest)} is damaged")
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array


def _bytes(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()

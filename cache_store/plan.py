"""Which sample is in which shard: decided once, before the first shard is written, and never again."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.commit import write_atomically
from alignkd.cache_store.spec import plain_json

_KEYS = "plan/keys.npy"
_PLAN = "plan/plan.json"


@dataclass(frozen=True)
class Plan:
    """``keys`` uint8 [samples, 16] in order, ``shard_samples`` of them to a shard; ``meta`` is the planner's own.

    ValueError for other arrays, for no samples, for fewer than one to a shard, and for a key that comes twice.
    """

    keys: NDArray[np.uint8]
    shard_samples: int
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", plain_json(self.meta))
        if self.keys.dtype != np.uint8 or self.keys.ndim != 2 or self.keys.shape[1] != 16:
            raise ValueError(f"keys: found {self.keys.dtype} {list(self.keys.shape)}, expected uint8 [samples, 16]")
        if not len(self.keys):
            raise ValueError("a plan without samples: found none in the data file, expected at least one")
        if self.shard_samples < 1:
            raise ValueError(f"samples per shard: found {self.shard_samples}, expected at least 1")
        repeated = len(self.keys) - len(np.unique(np.ascontiguousarray(self.keys).view("V16")))
        if repeated:
            raise ValueError(f"{repeated} of {len(self.keys)} keys are repeated: plan identical samples once")

    @property
    def samples(self) -> int:
        """Number of planned samples."""
        return len(self.keys)

    @property
    def shards(self) -> int:
        """Number of planned shards; the last may be shorter."""
        return -(-self.samples // self.shard_samples)

    def keys_of(self, shard: int) -> list[str]:
        """Keys of a shard, in the order of the plan."""
        assert 0 <= shard < self.shards
        first = shard * self.shard_samples
        return [key.tobytes().hex() for key in self.keys[first : first + self.shard_samples]]

    def shard_of(self, key: str) -> int | None:
        """The shard that a key is planned for; None where it is not planned. Reads through all keys."""
        at = np.flatnonzero((self.keys == np.frombuffer(bytes.fromhex(key), np.uint8)).all(axis=1))
        return int(at[0]) // self.shard_samples if len(at) else None

    def summary(self) -> dict[str, Any]:
        """What makes two plans the same."""
        return {
            "samples": self.samples,
            "shards": self.shards,
            "shard_samples": self.shard_samples,
            "keys_sha256": hashlib.sha256(self.keys.tobytes()).hexdigest(),
            "meta": self.meta,
        }

    def write(self, root: Path) -> None:
        """Write ``plan/keys.npy`` and ``plan/plan.json``."""
        buffer = io.BytesIO()
        np.save(buffer, self.keys, allow_pickle=False)
        write_atomically(root / _KEYS, buffer.getvalue())
        write_atomically(root / _PLAN, (json.dumps(self.summary(), indent=2, sort_keys=True) + "\n").encode())

    @classmethod
    def load(cls, root: Path) -> Plan:
        """The plan of a cache; ValueError where it is missing or damaged."""
        try:
            summary = json.loads((root / _PLAN).read_text())
            keys = np.load(root / _KEYS, allow_pickle=False)
            plan = cls(keys, summary["shard_samples"], summary["meta"])
            damaged = plan.summary() != summary
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"the plan of the cache at {root} cannot be read ({error}): {_REMEDY}") from error
        if damaged:
            raise ValueError(f"the plan of the cache at {root} is damaged: its keys and plan.json disagree. {_REMEDY}")
        return plan


_REMEDY = "restore the folder plan/ from a copy, or write a new cache"

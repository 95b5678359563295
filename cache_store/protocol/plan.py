"""Which sample is in which shard: decided before the first shard is written, and never changed."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.errors import UnusableObjectError
from alignkd.cache_store.limits import max_decoded_bytes, raise_limit_hint
from alignkd.cache_store.protocol.names import PLAN
from alignkd.cache_store.rows.spec import plain_json
from alignkd.cache_store.storage import Storage
from alignkd.errors import CacheError, ConfigError, DataError, wrap_errors

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Plan:
    """``keys`` uint8 [samples, 16] in order, ``shard_samples`` of them per shard; ``meta`` belongs to the planner.

    ``extras`` are arrays of the planner with one entry per sample: where each sample is in the data file, for example.

    Raises:
        CacheError: arrays of another shape or dtype, or a key that occurs twice.
        DataError: no samples.
        ConfigError: fewer than one sample per shard.
    """

    keys: NDArray[np.uint8]
    shard_samples: int
    meta: Mapping[str, Any]
    extras: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "meta", plain_json(self.meta))
        if self.keys.dtype != np.uint8 or self.keys.ndim != 2 or self.keys.shape[1] != 16:
            raise CacheError(f"keys: found {self.keys.dtype} {list(self.keys.shape)}, expected uint8 [samples, 16]")
        if not len(self.keys):
            raise DataError("a plan without samples: found none in the data file, expected at least one")
        if self.shard_samples < 1:
            raise ConfigError(f"samples per shard: found {self.shard_samples}, expected at least 1")
        if any(len(array) != self.samples for array in self.extras.values()):
            raise CacheError("extra arrays of a plan must have one entry per sample")
        repeated = self._repeated()
        if repeated:
            raise CacheError(f"{repeated} of {len(self.keys)} keys are repeated: plan identical samples once")

    def _repeated(self) -> int:
        # Only keys with the same first eight bytes can be equal, and such keys are rare.
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

    @property
    def parts(self) -> tuple[Plan, ...]:
        """The plans that this one consists of, in the order in which they were frozen: itself, if nothing was appended."""
        return (self,)

    def shards_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each position in the plan."""
        return positions // self.shard_samples

    def positions_of(self, shard: int) -> range:
        """Positions in the plan of a shard's samples."""
        assert 0 <= shard < self.shards
        return range(shard * self.shard_samples, min((shard + 1) * self.shard_samples, self.samples))

    def keys_of(self, shard: int) -> list[str]:
        """Keys of a shard's samples, in the order of the plan."""
        positions = self.positions_of(shard)
        text = self.keys[positions.start : positions.stop].tobytes().hex()
        return [text[i : i + 32] for i in range(0, len(text), 32)]

    def locate(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Position in the plan of each key ``[N, 16]``; -1 if it is not planned."""
        prefixes, order = self._by_prefix
        wanted = np.ascontiguousarray(keys).view(">u8")[:, 0].astype(np.uint64)
        found = np.full(len(keys), -1, dtype=np.int64)
        at = np.searchsorted(prefixes, wanted)
        # Eight bytes almost always identify a key. Where several keys share them, each is compared in turn.
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
        """The shard that a key is planned for; None if it is not planned."""
        position = int(self.locate(np.frombuffer(bytes.fromhex(key), np.uint8)[None])[0])
        return None if position < 0 else int(self.shards_at(np.array([position]))[0])

    @cached_property
    def _by_prefix(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        prefixes = np.ascontiguousarray(self.keys).view(">u8")[:, 0].astype(np.uint64)
        order = np.argsort(prefixes, kind="stable")
        return prefixes[order], order

    def summary(self) -> dict[str, Any]:
        """What identifies the plan, for ``cache.json``; the hashes in it name the objects that hold its arrays."""
        return {
            "samples": self.samples,
            "shard_samples": self.shard_samples,
            "arrays": {name: hashlib.sha256(_to_npy(array)).hexdigest() for name, array in self._arrays.items()},
            "meta": self.meta,
        }

    @property
    def _arrays(self) -> dict[str, NDArray[Any]]:
        assert "keys" not in self.extras
        return {"keys": self.keys, **self.extras}

    def write(self, storage: Storage) -> None:
        """Write each array as ``plan/NAME-HASH.npy``."""
        for name, array in self._arrays.items():
            data = _to_npy(array)
            storage.write(_object(name, hashlib.sha256(data).hexdigest()), data)

    @classmethod
    def load(cls, storage: Storage, summary: Mapping[str, Any]) -> Plan:
        """The plan of a summary that :func:`check_summary` accepted.

        Raises:
            CacheError: an array is missing, damaged, or not what a plan has.
        """
        try:
            with wrap_errors(CacheError, "not a plan"):
                arrays = {name: _read(storage, name, digest) for name, digest in summary["arrays"].items()}
                plan = cls(arrays.pop("keys"), summary["shard_samples"], summary["meta"], arrays)
            if plan.samples != summary["samples"]:
                raise CacheError(f"found {plan.samples} samples, expected {summary['samples']}")
        except (CacheError, ConfigError, DataError) as error:
            raise CacheError(
                f"the plan of the cache at {storage.url} cannot be read ({error}):"
                " restore the folder plan/ from a copy, or write a new cache"
            ) from error
        return plan


def check_summary(summary: Any) -> None:
    """CacheError for anything that ``Plan.summary`` does not return.

    The names of its objects are made from it, so no name may lead out of the cache.
    """
    with wrap_errors(CacheError, f"a plan cannot be {str(summary)[:200]}"):
        names = all(_NAME.fullmatch(name) and _SHA256.fullmatch(digest) for name, digest in summary["arrays"].items())
        counts = [summary["samples"], summary["shard_samples"]]
        if not names or "keys" not in summary["arrays"] or not all(type(count) is int and count > 0 for count in counts):
            raise CacheError(f"a plan cannot be {str(summary)[:200]}")
        plain_json(summary["meta"])


def plan_objects(summary: Mapping[str, Any]) -> list[str]:
    """Names of the objects that hold a plan."""
    return [_object(name, digest) for name, digest in summary["arrays"].items()]


def _object(name: str, digest: str) -> str:
    return f"{PLAN}/{name}-{digest[:12]}.npy"


def _read(storage: Storage, name: str, digest: str) -> NDArray[Any]:
    path = _object(name, digest)
    try:
        data = storage.read(path, limit := max_decoded_bytes())
    except FileNotFoundError as error:
        raise CacheError(str(error)) from error
    except UnusableObjectError as error:
        raise CacheError(f"{error}; {raise_limit_hint(2 * limit)}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise CacheError(f"{path} is damaged: its sha256 is not the one in cache.json")
    with wrap_errors(CacheError, f"{path} is not an array"):
        return _from_npy(data)


def _to_npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _from_npy(data: bytes) -> NDArray[Any]:
    """The array in a .npy file; its header may not claim more values than there are, since numpy would allocate them."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("found another version of the .npy format, expected 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(f"found {len(data) - file.tell()} bytes of values, expected {dtype} {list(shape)}")
    array: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
    return array

"""Further plans: samples that were appended to a cache, and the shards that they are in.

1. The arrays of a further plan are written as those of the first, ``plan/keys-HASH.npy``.
2. Its record, ``plan/000001.json``, is written last, and only if the name is free: of two appends at once one is first, and
   the other plans again what is left. A further plan without a record does not exist; one with a record is never changed.

Shard numbers go on: the first shard of plan 1 follows the last one of the first plan. ``cache.json`` says by its format version
that there may be further plans, so a cache that nobody appended to is read as before, without looking for any.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignkd.cache_store.errors import UnusableObjectError
from alignkd.cache_store.limits import MAX_JSON_BYTES, load_json, max_decoded_bytes
from alignkd.cache_store.protocol.commit import older_than
from alignkd.cache_store.protocol.names import PLAN, further_plan_name, further_plan_numbers, our_names
from alignkd.cache_store.protocol.plan import Plan, check_summary, plan_objects
from alignkd.cache_store.storage import Storage
from alignkd.errors import CacheError, wrap_errors

_log = logging.getLogger(__name__)

_ARRAY = re.compile(r".*-([0-9a-f]{12})\.npy")


class GrownPlan(Plan):
    """Several plans, one after the other; ``meta`` and ``shard_samples`` are those of the first. Extras stay with the parts.

    Raises:
        CacheError: a sample is in two of them.
    """

    def __init__(self, parts: Sequence[Plan]) -> None:
        super().__init__(np.concatenate([part.keys for part in parts]), parts[0].shard_samples, parts[0].meta)
        self.__dict__["_parts"] = tuple(parts)

    @property
    def parts(self) -> tuple[Plan, ...]:
        """The plans in the order in which they were frozen."""
        parts: tuple[Plan, ...] = self.__dict__["_parts"]
        return parts

    @property
    def shards(self) -> int:
        """Shards of all parts."""
        return sum(part.shards for part in self.parts)

    def positions_of(self, shard: int) -> range:
        """Positions of a shard's samples, which lie in one part."""
        first_shard = first = 0
        for part in self.parts:
            if shard < first_shard + part.shards:
                found = part.positions_of(shard - first_shard)
                return range(first + found.start, first + found.stop)
            first_shard, first = first_shard + part.shards, first + part.samples
        raise AssertionError(f"shard {shard} of {self.shards}")

    def shards_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard of each position."""
        found = np.zeros(len(positions), np.int64)
        first_shard = first = 0
        for part in self.parts:
            inside = (positions >= first) & (positions < first + part.samples)
            found[inside] = first_shard + part.shards_at(positions[inside] - first)
            first_shard, first = first_shard + part.shards, first + part.samples
        return found

    def summary(self) -> dict[str, Any]:
        """The summary of the first part: the one that ``cache.json`` has."""
        return self.parts[0].summary()


def load_whole(storage: Storage, first: Mapping[str, Any]) -> Plan:
    """The plan of a cache with all further ones. ``first``: the summary of the first one.

    Raises:
        CacheError: a record or an array is missing or damaged.
    """
    parts = [Plan.load(storage, summary) for summary in (first, *_summaries(storage))]
    try:
        return GrownPlan(parts) if len(parts) > 1 else parts[0]
    except CacheError as error:
        raise _unreadable(storage, str(error)) from error


def further_objects(storage: Storage) -> list[str]:
    """Names of the records of all further plans, and of their arrays; CacheError as :func:`load_whole`."""
    found = []
    for number, summary in enumerate(_summaries(storage), 1):
        found += [further_plan_name(number), *plan_objects(summary)]
    return found


def freeze(storage: Storage, number: int, plan: Plan) -> bool:
    """Write a further plan, arrays first. False if another plan of this number was first."""
    plan.write(storage)
    if not storage.write(further_plan_name(number), _to_json(plan.summary())):
        return False
    plan.write(storage)  # a repair may have taken the arrays for strays, and swept them a moment ago
    _log.info("further plan %d is frozen: %d samples in %d shards", number, plan.samples, plan.shards)
    return True


def orphan_arrays(storage: Storage, first: Mapping[str, Any]) -> list[str]:
    """Arrays that no plan names, of an append that was killed or came second: the hash in the name is that of the bytes."""
    listed = {*plan_objects(first), *further_objects(storage)}
    return [name for name in our_names(storage, PLAN) if name not in listed and _is_whole_array(storage, name)]


def sweep_arrays(storage: Storage, first: Mapping[str, Any], *, min_age_s: float) -> list[str]:
    """Remove orphan arrays that are at least ``min_age_s`` old; returns their names."""
    old = older_than(storage, orphan_arrays(storage, first), min_age_s)
    for name in old:
        storage.delete(name)
        _log.info("swept %s: no plan names it", name)
    return old


def _summaries(storage: Storage) -> Iterator[dict[str, Any]]:
    """The summaries of the further plans, in order. They are looked for by name: a listing may lag."""
    for number in itertools.count(1):
        try:
            data = storage.read(further_plan_name(number), MAX_JSON_BYTES)
        except UnusableObjectError as error:
            raise _unreadable(storage, str(error)) from error
        except FileNotFoundError:
            beyond = [found for found in further_plan_numbers(storage) if found >= number]
            # One of this very number was written between the two looks; the plan is then as it was before.
            if beyond and beyond[0] > number:
                raise _unreadable(
                    storage, f"found {further_plan_name(beyond[0])}, but not {further_plan_name(number)}"
                ) from None
            return
        yield _parse(storage, number, data)


def _parse(storage: Storage, number: int, data: bytes) -> dict[str, Any]:
    try:
        with wrap_errors(CacheError, "not a further plan"):
            content = load_json(data)
            summary: dict[str, Any] = content["plan"]
            check_summary(summary)
            if _to_json(summary) != data:
                raise CacheError("its checksum does not match: the file is damaged")
    except CacheError as error:
        raise _unreadable(storage, f"{further_plan_name(number)}: {error}") from error
    return summary


def _to_json(summary: Mapping[str, Any]) -> bytes:
    """Readable JSON with its own checksum."""
    text = json.dumps(summary, sort_keys=True, separators=(",", ":"))
    content = {"plan": summary, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _is_whole_array(storage: Storage, name: str) -> bool:
    match = _ARRAY.fullmatch(name)
    try:
        return match is not None and hashlib.sha256(storage.read(name, max_decoded_bytes())).hexdigest()[:12] == match[1]
    except (FileNotFoundError, UnusableObjectError):
        return False


def _unreadable(storage: Storage, why: str) -> CacheError:
    return CacheError(
        f"the plan of the cache at {storage.url} cannot be read ({why}): restore the folder plan/ from a copy, or write a new"
        " cache"
    )

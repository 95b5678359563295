"""The samples of data that a cache lacks, and those of its shards that the data can make.

1. All keys of the data are looked for in the cache's plans. What is not planned is to be appended, in the order of a plan.
2. When the teacher is loaded and the settings are those of the cache, the further plan is frozen. Of several workers that
   append the same data one is first; the others find its plan, and take their part of its shards.
3. Shards of other data than this run's are left to those who have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.cache_store.protocol.further_plans import GrownPlan
from alignkd.cache_store.protocol.maintenance.append import append_plan
from alignkd.cache_store.protocol.manifest import read_manifest
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.spec import CacheSpec, check_fingerprint, check_spec
from alignkd.cache_store.storage import open_storage
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.data.authors import chosen_samples
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import describe_data, open_samples
from alignkd.pipeline.data.provenance import AnswerChoice
from alignkd.pipeline.data.sample import Sample
from alignkd.pipeline.stage_one.checks.place import check_room_to_continue


class SamplesOfPlan(Samples):
    """The samples of data at the positions of a plan.

    ``order``: the samples of the data in the order of a plan, each once. ``index``: of the sample at each position of the plan,
    -1 where the data does not hold it. ``lacking``: how many samples of the data the plan lacks. ``about``: what a plan
    notes of the data.
    """

    def __init__(self, samples: Samples, order: np.ndarray, plan: Plan, about: Mapping[str, Any]) -> None:
        self.samples, self.order, self.about, self.path = samples, order, about, samples.path
        positions, self.keys = plan.locate(samples.keys[order]), plan.keys
        self.index = np.full(plan.samples, -1, np.int64)
        self.index[positions[positions >= 0]] = order[positions >= 0]
        self.lacking = int((positions < 0).sum())

    def at(self, plan: Plan) -> SamplesOfPlan:
        """The same samples at the positions of another plan."""
        return SamplesOfPlan(self.samples, self.order, plan, self.about)

    def locators(self) -> dict[str, np.ndarray]:
        """None: whoever appends reads the data."""
        return {}

    @property
    def held(self) -> list[int]:
        """The positions whose samples the data holds."""
        found: list[int] = np.flatnonzero(self.index >= 0).tolist()
        return found

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position that :meth:`covers`."""
        return self.samples[int(self.index[position])]

    def covers(self, positions: range) -> bool:
        """Whether the data holds the samples at all of these positions."""
        return bool((self.index[positions.start : positions.stop] >= 0).all())

    def further(self, plan: Plan, shard_samples: int) -> Plan | None:
        """The plan of the samples that another plan lacks; None where it lacks none."""
        left = self.order[plan.locate(self.samples.keys[self.order]) < 0]
        return Plan(self.samples.keys[left], shard_samples, self.about) if len(left) else None


def find_samples_to_append(config: CacheTeacherConfig, weights: str = "") -> tuple[SamplesOfPlan, Plan]:
    """The samples of the data, and the cache's plan with them as it will be.

    ``weights``: the digest of the teacher's, where its own answers are chosen.

    Raises:
        CacheError: there is no cache, or it is damaged.
        DataError: the data cannot be read, or is not in a known format.
    """
    storage = open_storage(config.cache)
    plan = read_manifest(storage).load_plan(storage)
    choice = AnswerChoice(config.answers, weights)
    samples = chosen_samples(open_samples(config), choice)
    about = {**describe_data(config), **choice.as_meta(), "records": len(samples)}
    found = SamplesOfPlan(samples, samples.by_image(), plan, about)
    further = found.further(plan, config.shard_samples)
    whole = plan if further is None else GrownPlan([*plan.parts, further])
    return found.at(whole), whole


def append_samples(config: CacheTeacherConfig, spec: CacheSpec, samples: SamplesOfPlan) -> CacheStore:
    """Freeze the further plan of a cache, if the data has samples that it lacks.

    Raises:
        FingerprintMismatchError: other settings than those of the cache.
        ConfigError: no room.
    """
    store = open_store(config.cache)
    check_spec(store.spec, spec, cache=config.cache)
    check_fingerprint({"format": store.manifest.shard_format}, {"format": config.shard_format}, cache=config.cache)
    lacking = samples.at(store.plan).lacking
    if lacking:
        check_room_to_continue(store, lacking)
    return append_plan(config.cache, lambda plan: samples.further(plan, config.shard_samples))

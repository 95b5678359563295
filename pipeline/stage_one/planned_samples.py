"""The samples of a configuration, in the order of a cache's plan."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from alignkd.cache_store.protocol.manifest import NAME as MANIFEST
from alignkd.cache_store.protocol.manifest import read_manifest
from alignkd.cache_store.protocol.names import RUNS, our_names
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.storage import open_storage
from alignkd.errors import AlignkdError
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.data.authors import chosen_samples
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.data.open_samples import describe_data, known_samples, open_samples
from alignkd.pipeline.data.provenance import AnswerChoice
from alignkd.pipeline.hub.names import name_of

_log = logging.getLogger(__name__)
_RUN_BYTES = 2**24


def find_samples(config: CacheTeacherConfig, weights: str = "") -> tuple[Samples, Plan]:
    """The samples in the order of the plan, and the plan: that of the cache, if it was made from data of these sizes.

    ``weights``: the digest of the teacher's, where its own answers are chosen.

    Raises:
        DataError: the data cannot be read, is not in a known format, or has no sample whose answers are chosen.
    """
    choice = AnswerChoice(config.answers, weights)
    about = {**describe_data(config), **choice.as_meta()}
    storage = open_storage(config.cache)
    if storage.size(MANIFEST) is not None:
        plan = read_manifest(storage).load_plan(storage).parts[0]
        if _sizes(plan.meta) == _sizes(about) and plan.shard_samples == config.shard_samples:
            # Each sample is compared with its key when it is read, so changed data of the same size is noticed.
            known = known_samples(config, plan.keys, plan.extras)
            if known is not None:
                return known, plan
    samples = open_samples(config)
    records, samples = len(samples), chosen_samples(samples, choice)
    if len(samples) < records:
        _log.info("--answers %s: %s of %s samples", config.answers, f"{len(samples):,}", f"{records:,}")
    planned = samples.select(samples.by_image())
    return planned, Plan(planned.keys, config.shard_samples, {**about, "records": records}, planned.locators())


def _sizes(about: Mapping[str, Any]) -> dict[str, Any]:
    """What tells data apart without reading it: all but names, which a move changes, and counts."""
    return {name: value for name, value in about.items() if name not in ("data_file", "records")}


def cached_prompt_date(cache: str) -> str | None:
    """The date that a cache's prompts show; None where there is no cache, or its prompts show none."""
    storage = open_storage(cache)
    if storage.size(MANIFEST) is None:
        return None
    found = read_manifest(storage).spec.fingerprint.get("prompt_date")
    return found if isinstance(found, str) else None


def recorded_configuration(config: CacheTeacherConfig) -> dict[str, Any]:
    """The configuration that a run wrote this cache with; empty where there is none, or where the teacher is no name."""
    if name_of(config.teacher) is None:
        return {}
    storage = open_storage(config.cache)
    for name in our_names(storage, RUNS):
        try:
            found = json.loads(storage.read(name, _RUN_BYTES))["configuration"]
        except (AlignkdError, OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # the record serves people; without it, the fingerprint still tells another teacher
        if isinstance(found, dict):
            return found
    return {}

"""Whether a cache's teacher looks at its images: the figures that stage one leaves in the records of its runs."""

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from alignkd.cache_store.protocol.names import RUNS
from alignkd.cache_store.storage import Storage

SIGHT = "sight"
"""The key of the figures in a run's record."""

_NUMBERS = ("samples", "tokens", "gain", "standard_error", "median_advantage", "threshold")


def recorded_sight(storage: Storage) -> dict[str, Any] | None:
    """The figures in a run's record (:mod:`alignkd.pipeline.stage_one.checks.sight`); None where no record has any."""
    for name in storage.names(RUNS):
        with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            found = json.loads(storage.read(f"{RUNS}/{name}"))[SIGHT]
            if is_sight(found):
                return {key: found[key] for key in (*_NUMBERS, "blind")}
    return None


def is_sight(found: Any) -> bool:
    """Whether this is what stage one writes: others may have written the record."""
    if not isinstance(found, Mapping) or not isinstance(found.get("blind"), bool | None):
        return False
    return all(type(found.get(name)) in (int, float) and math.isfinite(found[name]) for name in _NUMBERS)


def sight_words(sight: Mapping[str, Any]) -> str:
    """The figures in one line."""
    judged = {None: ", of too few to say more", True: ": it does not look at its images", False: ""}[sight["blind"]]
    return (
        f"an image adds {sight['gain']:.3f} ± {sight['standard_error']:.3f} nats to an answer token of the teacher"
        f" ({sight['samples']:,} samples){judged}"
    )

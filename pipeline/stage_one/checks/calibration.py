"""``--calibration-from``: the tensors of another cache, so that rows of both mean the same."""

import numpy as np

from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.cache_store.rows.spec import CacheSpec, check_spec, without_data
from alignkd.errors import ConfigError
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig


def calibration_of(url: str, spec: CacheSpec) -> dict[str, np.ndarray]:
    """The tensors of the cache at ``url``, which must have been written as ``spec`` says, from any data.

    Raises:
        FingerprintMismatchError: it was written with other settings.
        CacheError: there is no cache, or it is damaged.
    """
    store = open_store(url)
    check_spec(without_data(store.spec), without_data(spec), cache=url)
    return dict(store.tensors)


def check_calibration(config: CacheTeacherConfig, store: CacheStore) -> None:
    """Refuse to continue a cache that has another calibration than the one asked for.

    Raises:
        ConfigError: names both caches.
    """
    if config.calibration_from is None or open_store(config.calibration_from).manifest.tensors == store.manifest.tensors:
        return
    raise ConfigError(
        f"the cache at {config.cache} was started with another calibration than --calibration-from {config.calibration_from}: a"
        " cache keeps its own. Write to another --cache, or leave the option out"
    )

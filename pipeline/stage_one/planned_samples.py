"""The samples of a data file, in the order of a cache's plan."""

from pathlib import Path

from alignkd.cache_store.protocol.manifest import NAME as MANIFEST
from alignkd.cache_store.protocol.manifest import read_manifest
from alignkd.cache_store.protocol.plan import Plan
from alignkd.cache_store.storage import open_storage
from alignkd.errors import DataError
from alignkd.pipeline.config.cache_teacher import CacheTeacherConfig
from alignkd.pipeline.data.samples import SampleFile
from alignkd.pipeline.runtime.retries import with_retries


def find_samples(config: CacheTeacherConfig) -> tuple[SampleFile, Plan]:
    """The samples in the order of the plan, and the plan: that of the cache, if it was made from a file of this size.

    Raises:
        DataError: the data file cannot be read, or is not in a known format.
    """
    size = _size(config.data)
    storage = open_storage(config.cache)
    if storage.size(MANIFEST) is not None:
        plan = read_manifest(storage).load_plan(storage)
        same = plan.meta.get("bytes") == size and plan.shard_samples == config.shard_samples
        if same and {"starts", "lengths"} <= plan.extras.keys():
            # Each sample is compared with its key when it is read, so a changed file of the same size is noticed.
            extras = plan.extras
            return SampleFile.known(config.data, plan.keys, extras["starts"], extras["lengths"], extras.get("numbers")), plan
    file = SampleFile(config.data)
    order = file.by_image()
    keys, starts, lengths = file.keys[order], file.starts[order], file.lengths[order]
    meta = {"data_file": Path(config.data).name, "bytes": size, "records": len(file)}
    extras = {"starts": starts.astype("<i8"), "lengths": lengths.astype("<i8")}
    if file.faults:  # to name a record that has no id
        extras["numbers"] = order.astype("<i8")
    plan = Plan(keys, config.shard_samples, meta, extras)
    return SampleFile.known(config.data, keys, starts, lengths, order), plan


def cached_prompt_date(cache: str) -> str | None:
    """The date that a cache's prompts show; None where there is no cache, or its prompts show none."""
    storage = open_storage(cache)
    if storage.size(MANIFEST) is None:
        return None
    found = read_manifest(storage).spec.fingerprint.get("prompt_date")
    return found if isinstance(found, str) else None


def _size(path: str) -> int:
    try:
        return with_retries(lambda: Path(path).stat().st_size, f"reading data file {path}")
    except OSError as error:
        raise DataError(f"data file {path}: {error.strerror}") from error

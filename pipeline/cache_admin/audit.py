"""Commands that read a whole cache, each with a progress bar."""

from alignkd.cache_store.protocol.maintenance.convert import convert
from alignkd.cache_store.protocol.maintenance.verify import VerifyReport, verify
from alignkd.cache_store.protocol.store import CacheStore, open_store
from alignkd.pipeline.runtime.progress import progress_bar


def verify_with_progress(url: str, *, quick: bool) -> VerifyReport:
    """``cache_store.verify``, with a bar over the committed shards."""
    store = open_store(url)
    with progress_bar("verify", store.plan.shards - len(store.pending()), "shards") as progress:
        return verify(url, quick=quick, on_shard=progress.advance)


def convert_with_progress(source: str, target: str, shard_format: str | None) -> CacheStore:
    """``cache_store.convert``, with a bar over the source's committed shards."""
    store = open_store(source)
    with progress_bar("convert", store.plan.shards - len(store.pending()), "shards") as progress:
        return convert(source, target, shard_format, on_shard=progress.advance)

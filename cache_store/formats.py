"""The shard formats by the end of their file names."""

from __future__ import annotations

from alignkd.cache_store import zarr_shard
from alignkd.cache_store.shard import ShardFormat

FORMATS: dict[str, ShardFormat] = {zarr_shard.SUFFIX: zarr_shard}


def format_of(object_name: str) -> ShardFormat:
    """The format of a shard object; ValueError that lists the known endings."""
    for suffix, shard_format in FORMATS.items():
        if object_name.endswith(suffix):
            return shard_format
    raise ValueError(f"unknown shard format {object_name!r}: expected a name that ends in {', '.join(FORMATS)}")

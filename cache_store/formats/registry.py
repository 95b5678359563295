"""The shard formats, by name and by the end of their objects' names."""

from __future__ import annotations

from alignkd.cache_store.formats import webdataset_shard, zarr_shard
from alignkd.cache_store.rows.shard import ShardFormat

FORMATS: dict[str, ShardFormat] = {shard_format.NAME: shard_format for shard_format in (zarr_shard, webdataset_shard)}


def get_format(name: str) -> ShardFormat:
    """The format called ``name``; ValueError that lists the known ones."""
    if name not in FORMATS:
        raise ValueError(f"unknown shard format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_of(object_name: str) -> ShardFormat:
    """The format of a shard object; ValueError that lists the known endings."""
    for shard_format in FORMATS.values():
        if object_name.endswith(shard_format.SUFFIX):
            return shard_format
    endings = ", ".join(shard_format.SUFFIX for shard_format in FORMATS.values())
    raise ValueError(f"unknown shard format {object_name!r}: expected a name that ends in {endings}")

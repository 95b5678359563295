"""The shard formats, by name and by the suffix of their objects."""

from __future__ import annotations

from alignkd.cache_store.errors import CorruptShardError
from alignkd.cache_store.formats import webdataset_shard, zarr_shard
from alignkd.cache_store.formats.contract import ShardFormat
from alignkd.errors import ConfigError

FORMATS: dict[str, ShardFormat] = {shard_format.NAME: shard_format for shard_format in (zarr_shard, webdataset_shard)}


def get_format(name: str) -> ShardFormat:
    """The format of this name.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown shard format {name!r}: expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_of(object_name: str) -> ShardFormat:
    """The format of a shard object.

    Raises:
        CorruptShardError: unknown suffix; the message lists the known ones.
    """
    for shard_format in FORMATS.values():
        if object_name.endswith(shard_format.SUFFIX):
            return shard_format
    suffixes = ", ".join(shard_format.SUFFIX for shard_format in FORMATS.values())
    raise CorruptShardError(f"unknown shard format {object_name!r}: expected a name that ends in {suffixes}")

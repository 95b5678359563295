"""Codecs: one array of targets <-> the named parts that are stored. Most keep fewer bits and lose precision.

A codec reduces precision only; the shard format compresses the parts without loss. Each codec states its largest error
per element (in its docstring and in docs/cache-format.md), so that cached training can be compared with online training.
"""

from __future__ import annotations

from alignkd.cache_store.codecs.contract import Array, Codec, Layout, Shape
from alignkd.cache_store.codecs.integers import Int4Blocks, Int8Rows
from alignkd.cache_store.codecs.nats import Nats8
from alignkd.cache_store.codecs.plain import Exact, Float16
from alignkd.cache_store.codecs.probabilities import SquareRoot
from alignkd.errors import ConfigError

__all__ = ["CODECS", "Array", "Codec", "Layout", "Shape", "get_codec"]

CODECS: dict[str, Codec] = {
    "exact": Exact(),
    "float16": Float16(),
    "int8-rows": Int8Rows(),
    "int4-blocks": Int4Blocks(),
    "sqrt8": SquareRoot(8),
    "sqrt4": SquareRoot(4),
    "nats8": Nats8(),
}


def get_codec(name: str) -> Codec:
    """The codec of this name.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if name not in CODECS:
        raise ConfigError(f"unknown codec {name!r}: expected one of {', '.join(sorted(CODECS))}")
    return CODECS[name]

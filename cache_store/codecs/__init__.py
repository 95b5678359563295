"""Quantisers: how one array of targets becomes the named parts that are stored, and how far the way back may stray.

A codec makes values smaller by keeping less of them. Squeezing the parts further, without loss, is the shard's work.
Every codec states a worst-case error for each element, so cached training can be compared with online training.
"""

from __future__ import annotations

from alignkd.cache_store.codecs.contract import Array, Codec, Layout, Shape
from alignkd.cache_store.codecs.integers import Int4Blocks, Int8Rows
from alignkd.cache_store.codecs.plain import Exact, Float16
from alignkd.cache_store.codecs.probabilities import SquareRoot

__all__ = ["CODECS", "Array", "Codec", "Layout", "Shape", "get_codec"]

CODECS: dict[str, Codec] = {
    "exact": Exact(),
    "float16": Float16(),
    "int8-rows": Int8Rows(),
    "int4-blocks": Int4Blocks(),
    "sqrt8": SquareRoot(8),
    "sqrt4": SquareRoot(4),
}


def get_codec(name: str) -> Codec:
    """The codec called ``name``; ValueError that lists the known ones."""
    if name not in CODECS:
        raise ValueError(f"unknown codec {name!r}: expected one of {', '.join(sorted(CODECS))}")
    return CODECS[name]

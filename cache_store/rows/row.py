"""One sample in the cache: its targets, or the reason why it has none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from alignkd.cache_store.codecs import Array, Shape
from alignkd.cache_store.rows.spec import FieldSpec

_KEY = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Row:
    """The targets of one sample.

    ``key`` is 32 lower-case hex characters (16 bytes). ``image_sha256`` is 64 of them, or "" without an image.
    ``values`` has every field of the spec; a target that a sample does not have is an array of size zero, as [H, 0, 0].
    """

    key: str
    sample_id: str
    image_sha256: str
    values: Mapping[str, Array]


class RowId(NamedTuple):
    """The sample that a row belongs to; see :class:`Row`."""

    key: str
    sample_id: str
    image_sha256: str


@dataclass(frozen=True)
class EncodedField:
    """One field of one row, not decoded: the ``parts`` of its codec, reshaped; ``shape`` is the decoded shape.

    The parts may be views into a shard: do not write into them.
    """

    field: FieldSpec
    shape: Shape
    parts: Mapping[str, Array]


@dataclass(frozen=True)
class Rejected:
    """A planned sample without targets, and why."""

    key: str
    sample_id: str
    reason: str


def is_key(text: object) -> bool:
    """Whether ``text`` is 32 lower-case hex characters."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None

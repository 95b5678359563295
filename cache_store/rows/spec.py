"""What a cache holds, and what its targets were made from: two settings that differ never share a cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import get_codec

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHOWN = 64
_ABSENT = object()
_Path = tuple[str, ...]


class FingerprintMismatchError(ValueError):
    """The cache was written with other settings than the ones asked for."""


@dataclass(frozen=True)
class FieldSpec:
    """One ragged array that every row holds.

    ``dims`` names its axes ("H", "T", "V"), one size each in every row; ``dtype`` is the numpy name of the decoded
    values; ``codec`` is a name in ``codecs.CODECS``. ValueError where the three do not fit together. The values of a
    ``per_image`` field depend on the row's images alone, and a shard stores them once for all rows of the same images.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    codec: str
    per_image: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"field name {self.name!r}: expected lower-case letters, digits and _, a letter first")
        object.__setattr__(self, "dims", tuple(self.dims))
        try:
            get_codec(self.codec).layout((0,) * len(self.dims), self.numpy_dtype)
        except (TypeError, ValueError) as error:
            raise ValueError(f"field {self.name!r}: {error}") from error

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Decoded dtype."""
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class CacheSpec:
    """The fields of every row, and ``fingerprint``: a JSON-able mapping of everything that determines the targets."""

    fields: tuple[FieldSpec, ...]
    fingerprint: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "fingerprint", plain_json(self.fingerprint))
        names = [field.name for field in self.fields]
        if len(set(names)) < len(names):
            raise ValueError(f"field names must differ, found {', '.join(names)}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "fields": [{**asdict(field), "dims": list(field.dims)} for field in self.fields],
            "fingerprint": self.fingerprint,
        }


def check_fingerprint(found: Mapping[str, Any], wanted: Mapping[str, Any], *, cache: str) -> None:
    """Raise FingerprintMismatchError that names every differing key with both values; ``cache`` is named in the message."""
    theirs, ours = dict(_leaves(found)), dict(_leaves(wanted))
    pairs = {key: (theirs.get(key, _ABSENT), ours.get(key, _ABSENT)) for key in sorted({**theirs, **ours})}
    lines = [
        f"  {'.'.join(key)}: cache has {_shorten(has)}, wanted {_shorten(wants)}"
        for key, (has, wants) in pairs.items()
        if not _same(has, wants)
    ]
    if not lines:
        return
    raise FingerprintMismatchError(
        f"the cache at {cache} was written with other settings:\n" + "\n".join(lines) + "\n"
        "Write to another --cache, or use the settings the cache was written with."
    )


def check_spec(found: CacheSpec, wanted: CacheSpec, *, cache: str) -> None:
    """``check_fingerprint`` over fields (in any order) and fingerprint together."""
    check_fingerprint(_comparable(found), _comparable(wanted), cache=cache)


def _comparable(spec: CacheSpec) -> dict[str, Any]:
    fields = {field["name"]: field for field in spec.to_dict()["fields"]}
    return {"field": fields, "fingerprint": spec.fingerprint}


def _leaves(tree: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _same(a: Any, b: Any) -> bool:
    # 1 and 1.0 are one setting; 1 and True are two.
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _shorten(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value, sort_keys=True)
    if len(text) <= _SHOWN:
        return text
    # Two long values may begin and end alike; their digests do not.
    return f"{text[: _SHOWN - 16]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def plain_json(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy as JSON would give it back: tuples become lists. ValueError for what JSON cannot hold."""
    try:
        copy = json.loads(json.dumps(dict(mapping), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings hold only what JSON can: {error}") from error
    assert isinstance(copy, dict)
    return copy

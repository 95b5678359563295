"""The fields of a cache, and the fingerprint of its settings: targets of different settings never share a cache."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alignkd.cache_store.codecs import get_codec
from alignkd.cache_store.errors import FingerprintMismatchError
from alignkd.errors import ConfigError

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_SHOWN = 64
_ABSENT = object()
_Path = tuple[str, ...]
_DATA: _Path = ("fingerprint", "data")


@dataclass(frozen=True)
class FieldSpec:
    """One ragged array that every row has.

    ``dims`` names its axes ("H", "T", "V"), whose sizes differ from row to row; ``dtype`` is the numpy name of the decoded
    values; ``codec`` is a name in ``codecs.CODECS``. The values of a ``per_image`` field depend on the row's images alone:
    a shard stores them once for all rows with the same images.

    Raises:
        ConfigError: a bad name, or a codec that cannot store such arrays.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    codec: str
    per_image: bool = False

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"field name {self.name!r}: expected lower-case letters, digits and _, beginning with a letter")
        object.__setattr__(self, "dims", tuple(self.dims))
        if not all(isinstance(dim, str) for dim in self.dims) or not isinstance(self.per_image, bool):
            raise ConfigError(f"field {self.name!r}: expected names of dimensions, and true or false for per_image")
        try:
            get_codec(self.codec).layout((0,) * len(self.dims), self.numpy_dtype)
        except (SyntaxError, TypeError, ValueError) as error:  # numpy's own where it does not know the dtype
            raise ConfigError(f"field {self.name!r}: {error}") from error

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Decoded dtype."""
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class CacheSpec:
    """The fields of every row, and ``fingerprint``: everything that determines the targets, as a mapping that fits in JSON.

    Raises:
        ConfigError: two fields of one name, or a fingerprint that JSON cannot hold.
    """

    fields: tuple[FieldSpec, ...]
    fingerprint: Mapping[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", tuple(self.fields))
        object.__setattr__(self, "fingerprint", plain_json(self.fingerprint))
        names = [field.name for field in self.fields]
        if len(set(names)) < len(names):
            raise ConfigError(f"field names must differ, found {', '.join(names)}")

    def to_dict(self) -> dict[str, Any]:
        """A mapping for JSON."""
        return {
            "fields": [{**asdict(field), "dims": list(field.dims)} for field in self.fields],
            "fingerprint": self.fingerprint,
        }


def check_fingerprint(found: Mapping[str, Any], wanted: Mapping[str, Any], *, cache: str) -> None:
    """Compare the fingerprint of the cache at ``cache`` with the wanted one.

    Raises:
        FingerprintMismatchError: they differ; names each key that differs with both values.
    """
    has, wants = dict(_leaves(found)), dict(_leaves(wanted))
    pairs = {key: (has.get(key, _ABSENT), wants.get(key, _ABSENT)) for key in sorted({**has, **wants})}
    lines = [
        f"  {'.'.join(key)}: cache has {_shorten(there)}, wanted {_shorten(asked)}"
        for key, (there, asked) in pairs.items()
        if not _same(there, asked)
    ]
    if not lines:
        return
    differing = [key for key, pair in pairs.items() if not _same(*pair)]
    raise FingerprintMismatchError(
        f"the cache at {cache} was written with other settings:\n" + "\n".join(lines) + "\n"
        "Write to another --cache, or use the settings the cache was written with."
        + (" To add the samples of other data to this cache, run alignkd cache append." if differing == [_DATA] else "")
    )


def check_spec(found: CacheSpec, wanted: CacheSpec, *, cache: str) -> None:
    """:func:`check_fingerprint` for the fields, in any order, and the fingerprint together."""
    check_fingerprint(_comparable(found), _comparable(wanted), cache=cache)


def without_data(spec: CacheSpec) -> CacheSpec:
    """The specification of a cache of the same settings and any data."""
    return CacheSpec(spec.fields, {name: value for name, value in spec.fingerprint.items() if name != _DATA[-1]})


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
    # 1 and 1.0 are the same setting; 1 and True are not.
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def _shorten(value: Any) -> str:
    if value is _ABSENT:
        return "nothing"
    text = json.dumps(value, sort_keys=True)
    if len(text) <= _SHOWN:
        return text
    # Two long values may begin alike; their digests differ.
    return f"{text[: _SHOWN - 16]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def plain_json(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy, as it comes back from JSON: tuples become lists.

    Raises:
        ConfigError: JSON cannot hold it.
    """
    try:
        copy = json.loads(json.dumps(dict(mapping), allow_nan=False))
    except (RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"settings must fit in JSON: {error}") from error
    assert isinstance(copy, dict)
    return copy

"""What the fields of a row hold, by the names that docs/cache-format.md fixes, and the sizes that the fingerprint fixes.

Shapes: L ids, H teacher heads, T text rows, V vision columns, R regions, D teacher width, A answers, K kept tokens, J draws,
S bytes of a sketch, N vocabulary of the distributions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.errors import CacheError

_ATTENTION = re.compile(r"attention(_[0-9]+)?")
_OF_ANSWERS = (
    *("topk_rank_steps", "topk_logprob_codes", "tail_logmass", "logsumexp"),
    *("draw_rank_steps", "draw_logprob_codes", "sketch", "hidden", "advantage"),
)

_FLOATS = ("float32",)
_FORMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "attention": (3, _FLOATS),
    "input_ids": (1, ("int32",)),
    "labels": (1, ("int32",)),
    "spans": (2, ("int32",)),
    "regions": (2, _FLOATS),
    "vision_tokens": (2, _FLOATS),
    "topk_rank_steps": (2, ("uint16", "uint32")),
    "topk_logprob_codes": (2, ("uint8",)),
    "tail_logmass": (1, _FLOATS),
    "logsumexp": (1, _FLOATS),
    "draw_rank_steps": (2, ("uint16", "uint32")),
    "draw_logprob_codes": (2, ("uint8",)),
    "sketch": (2, ("uint8",)),
    "hidden": (2, _FLOATS),
    "advantage": (1, _FLOATS),
}
"""Number of axes and dtypes of each field."""

_WITH_CODECS = {"attention", "vision_tokens", "hidden"}
_PLAIN_FLOATS = {"tail_logmass", "logsumexp"}
_OWN_CODEC = {"advantage": ("nats8",)}
_PER_IMAGE = {"vision_tokens", "regions"}


@dataclass(frozen=True)
class Sizes:
    """What a fingerprint says about every row; None where it says nothing.

    ``vocabulary``: columns of the teacher's output head. ``ids``: N, the ids that its distributions are over.
    """

    heads: int | None = None
    width: int | None = None
    vocabulary: int | None = None
    ids: int | None = None
    top_k: int | None = None
    draws: int | None = None
    sketch_bytes: int | None = None
    image_token_id: int | None = None
    tokens_per_placeholder: int | None = None

    @classmethod
    def of(cls, fingerprint: Mapping[str, Any]) -> Sizes | None:
        """The sizes in the fingerprint of a teacher's cache; None for any other cache, whose names promise nothing."""
        teacher, targets = fingerprint.get("teacher"), fingerprint.get("targets")
        if not isinstance(teacher, Mapping) or not isinstance(targets, Mapping):
            return None
        logits = targets.get("logits")
        logits = logits if isinstance(logits, Mapping) else {}
        vocabulary = _count(teacher, "vocabulary")
        image = teacher.get("image_token_id")
        return cls(
            heads=1 if targets.get("attention") == "mean" else _count(teacher, "heads"),
            width=_count(teacher, "width"),
            vocabulary=vocabulary,
            ids=_count(logits, "vocabulary") or vocabulary,
            top_k=_count(logits, "top_k"),
            draws=_count(logits, "draws"),
            sketch_bytes=_count(logits, "sketch_bytes"),
            image_token_id=image if type(image) is int else None,
            tokens_per_placeholder=_count(teacher, "tokens_per_placeholder"),
        )


def is_attention(name: str) -> bool:
    """Whether a field holds attention probabilities, [H, T, V]."""
    return _ATTENTION.fullmatch(name) is not None


def check_forms(spec: CacheSpec) -> None:
    """Refuse fields that no teacher's cache has under their names.

    Raises:
        CacheError: another number of axes, dtype or codec.
    """
    for field in spec.fields:
        name = "attention" if is_attention(field.name) else field.name
        if name not in _FORMS:
            continue
        axes, dtypes = _FORMS[name]
        plain = ("exact", "float16") if name in _PLAIN_FLOATS else _OWN_CODEC.get(name, ("exact",))
        sound = len(field.dims) == axes and field.dtype in dtypes and (name in _WITH_CODECS or field.codec in plain)
        if not sound or (field.per_image and name not in _PER_IMAGE):
            raise CacheError(
                f"field {field.name!r} is {field.dtype} [{', '.join(field.dims)}] in the codec {field.codec!r}, where a"
                f" teacher's cache has {' or '.join(dtypes)} with {axes} axes. Restore cache.json from a copy, or write a new"
                " cache"
            )


def answer_fields(spec: CacheSpec) -> list[str]:
    """The fields with one entry an answer token, [A, ...]."""
    return [field.name for field in spec.fields if field.name in _OF_ANSWERS]


def fixed_axes(name: str, sizes: Sizes) -> dict[int, int]:
    """The axes of a field whose size is the same in every row: axis -> size."""
    sizes_of: dict[str, dict[int, int | None]]
    if is_attention(name):
        known: dict[int, int | None] = {0: sizes.heads}
    else:
        sizes_of = {
            "spans": {1: 2},
            "regions": {1: 8},
            "vision_tokens": {1: sizes.width},
            "hidden": {1: sizes.width},
            "topk_rank_steps": {1: sizes.top_k},
            "topk_logprob_codes": {1: sizes.top_k},
            "draw_rank_steps": {1: sizes.draws},
            "draw_logprob_codes": {1: sizes.draws},
            "sketch": {1: sizes.sketch_bytes},
        }
        known = sizes_of.get(name, {})
    return {axis: size for axis, size in known.items() if size is not None}


def _count(mapping: Mapping[str, Any], key: str) -> int | None:
    value = mapping.get(key)
    return value if type(value) is int and value >= 1 else None

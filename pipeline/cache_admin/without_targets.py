"""What a cache would say of itself if it had been written without some of its targets."""

from collections.abc import Collection, Sequence
from typing import Any

from alignkd.cache_store.rows.spec import CacheSpec
from alignkd.errors import ConfigError
from alignkd.pipeline.config.cache_layout import (
    ADVANTAGE,
    ALL_TARGETS,
    LOGIT_TENSOR,
    PROJECTOR_TENSOR,
    SLICED,
    attention_layer,
    is_slice,
)
from alignkd.pipeline.config.fingerprint_keys import check_fingerprint_keys

_OF_LOGITS = {
    "topk_rank_steps",
    "topk_logprob_codes",
    "tail_logmass",
    "logsumexp",
    "draw_rank_steps",
    "draw_logprob_codes",
    "sketch",
    "hidden",
}
_TENSORS_OF = {"logits": LOGIT_TENSOR, "vision": PROJECTOR_TENSOR}


def without_targets(spec: CacheSpec, tensors: Collection[str], names: Sequence[str]) -> tuple[CacheSpec, list[str]]:
    """The fields and the fingerprint of a cache without the targets of these names, and the tensors that it needs.

    Raises:
        ConfigError: names a target that is unknown or not there, or what would be left is no target.
        CacheError: the fingerprint does not describe its targets.
    """
    fingerprint = dict(spec.fingerprint)
    check_fingerprint_keys(fingerprint, "targets")
    targets: dict[str, Any] = dict(fingerprint["targets"])
    held = [name for name in ALL_TARGETS if targets.get(name)]
    for name in names:
        if name not in held:
            raise ConfigError(f"--without {name}: this cache has no such target, it has: {', '.join(held) or 'none'}")
        if is_slice(fingerprint) and name in SLICED:
            raise ConfigError(
                f"--without {name}: attention and vision tokens of this cache are recomputed from one slice of the teacher,"
                " which holds both; only logits can be left out"
            )
    left = [name for name in held if name not in names]
    if not left:
        raise ConfigError(f"--without {','.join(names)}: nothing would be left, the cache has: {', '.join(held)}")
    targets |= {name: False if name == "vision" else None for name in names}
    if ADVANTAGE in names:
        targets.pop(ADVANTAGE)
    if "attention" in names:
        targets.pop("attention_layers", None)
    if "logits" in names:
        fingerprint.pop("tokenizer_first_ids", None)
    dropped = {*names} | ({"regions"} if SLICED.isdisjoint(left) and not SLICED.isdisjoint(names) else set())
    fields = tuple(field for field in spec.fields if _part_of(field.name) not in dropped)
    left_out = tuple(tensor.format("") for target, tensor in _TENSORS_OF.items() if target in names)
    kept = [name for name in tensors if not name.startswith(left_out)]
    return CacheSpec(fields, {**fingerprint, "targets": targets}), kept


def _part_of(field: str) -> str:
    """The target that a field belongs to; its own name where that is none."""
    if attention_layer(field) is not None:
        return "attention"
    return "vision" if field == "vision_tokens" else "logits" if field in _OF_LOGITS else field

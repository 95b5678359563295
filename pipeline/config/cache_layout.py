"""What a cache says of itself: the fields that hold each target, and what its fingerprint means."""

from collections.abc import Mapping
from typing import Any

LOGIT_TENSOR = "logits.{}"
"""Name of a tensor that a cache keeps once for its logit targets."""

PROJECTOR_TENSOR = "projector.{}"
"""Name of a tensor that a cache keeps once beside its vision tokens: of the projector that gave them."""

ALIGNMENTS = ("targets", "slice")

TARGETS = ("attention", "vision", "logits")
"""The targets of a cache, if no others are asked for."""

ADVANTAGE = "advantage"
"""The target, and its field, that says how much of each answer token the teacher takes from the image."""

ALL_TARGETS = (*TARGETS, ADVANTAGE)

SLICED = frozenset({"attention", "vision"})
"""The targets that a slice gives."""

_OF_LAYER = "attention_"
"""Begins the fields of attention of other layers than the first."""


def logit_width(fingerprint: Mapping[str, Any]) -> int:
    """N: ids that a cache's distributions are over, or would be if it held any."""
    found = fingerprint["targets"]["logits"] or {}
    return int(found.get("vocabulary", fingerprint["teacher"]["vocabulary"]))


def is_slice(fingerprint: dict[str, Any]) -> bool:
    """Whether a cache's attention and vision tokens are recomputed from a slice."""
    return bool(fingerprint.get("alignment") == "slice")


def attention_field(layer: int) -> str:
    """The field that holds the attention of one of the teacher's layers."""
    return f"{_OF_LAYER}{layer}" if layer else "attention"


def attention_layer(name: str) -> int | None:
    """The layer whose attention a field holds; None where it holds another target."""
    if name == "attention":
        return 0
    number = name.removeprefix(_OF_LAYER)
    return int(number) if number != name and number.isascii() and number.isdecimal() else None

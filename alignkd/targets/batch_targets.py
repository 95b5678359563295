"""Teacher targets of a batch, as a cache stores them or as tensors.

Shapes: B samples, H teacher heads, T text rows, V vision columns, D teacher width, A answers: P with a target, U without.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch

from alignkd.inputs.batch import Batch, Counts
from alignkd.targets.dequantise import Quantised

Target = torch.Tensor | Quantised
"""A target as a tensor, or still as the small integers of its codec."""

_T = TypeVar("_T", bound="Targets")


@dataclass(frozen=True)
class Targets:
    """What the teacher gave for a batch, padded as the batch is; a target that the cache lacks is absent.

    ``attention``: probabilities ``[B, H, T, V]`` by the teacher's layer (H = 1 for a head mean). ``vision_BVD``: projected
    vision tokens. ``answers``: fields of :mod:`alignkd.targets.logits`, ``[A, ..]`` each.
    ``advantage_A``: how much of each answer token the teacher takes from the image (:mod:`alignkd.capture.advantage`).
    ``row_mask_BT``, ``column_mask_BV``: text rows and vision columns that have a target; None: all that are not padding.
    ``paired_P``, ``unpaired_U``: the answers that have targets (``answers`` and ``advantage_A`` are then ``[P, ..]`` each), and
    all others; None: every answer has.
    """

    attention: Mapping[int, Target] = field(default_factory=dict)
    vision_BVD: Target | None = None
    answers: Mapping[str, Target] = field(default_factory=dict)
    advantage_A: Target | None = None
    row_mask_BT: torch.Tensor | None = None
    column_mask_BV: torch.Tensor | None = None
    paired_P: torch.Tensor | None = None
    unpaired_U: torch.Tensor | None = None

    def mask_to_targets(self, batch: Batch) -> Batch:
        """The batch with masks of only those text rows and vision columns that have a target."""
        if self.row_mask_BT is not None:
            batch = replace(batch, text_mask_BT=batch.text_mask_BT & self.row_mask_BT)
        if self.column_mask_BV is not None:
            batch = replace(batch, vision_mask_BV=batch.vision_mask_BV & self.column_mask_BV)
        return batch

    def counts(self, batch: Batch) -> Counts:
        """What the terms of this batch are averaged over. Both should be on the host: otherwise this waits for the device."""
        return self.mask_to_targets(batch).counts()

    def to(self: _T, device: torch.device | str) -> _T:
        """The targets on another device (asynchronously from pinned memory)."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self: _T) -> _T:
        """Page-locked copies, so that :meth:`to` need not wait."""
        return self._map(lambda t: t.pin_memory())

    def dequantise(self) -> "DecodedTargets":
        """The targets that the losses take, on the same device: quantised attention and vision tokens become float32.

        Answers that a cache stores exactly keep their dtype: ids and codes are integers.
        """
        return DecodedTargets(
            {layer: _decoded(target) for layer, target in self.attention.items()},
            None if self.vision_BVD is None else _decoded(self.vision_BVD),
            {name: _decoded(target, keep_exact=True) for name, target in self.answers.items()},
            None if self.advantage_A is None else _decoded(self.advantage_A),
            self.row_mask_BT,
            self.column_mask_BV,
            self.paired_P,
            self.unpaired_U,
        )

    def _map(self: _T, function: Callable[[torch.Tensor], torch.Tensor]) -> _T:
        def mapped(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: mapped(target) for key, target in value.items()}
            if isinstance(value, Quantised):
                return value.map(function)
            return None if value is None else function(value)

        return replace(self, **{f.name: mapped(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class DecodedTargets(Targets):
    """Targets that are all tensors."""

    attention: Mapping[int, torch.Tensor] = field(default_factory=dict)
    vision_BVD: torch.Tensor | None = None
    answers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    advantage_A: torch.Tensor | None = None


def _decoded(target: Target, *, keep_exact: bool = False) -> torch.Tensor:
    if isinstance(target, torch.Tensor):
        return target
    if keep_exact and target.codec == "exact":
        return target.parts["values"].view(target.shape)
    return target.dequantise()

"""Teacher targets of a batch.

Shapes: B samples, H teacher heads, T text rows, V vision columns, D teacher width, A answers: P with a target, U without.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from alignkd.inputs.batch import Batch
from alignkd.targets.dequantise import Quantised


@dataclass(frozen=True)
class Targets:
    """What the teacher gave for a batch, padded as the batch is; a target that the cache lacks is None.

    ``attention_BHTV``: first-layer probabilities (H = 1 for a head mean); ``other_layers``: those of other layers of the
    teacher, by number. ``vision_BVD``: projected vision tokens.
    ``answers``: fields of :mod:`alignkd.targets.logits`, ``[A, ..]`` each.
    ``row_mask_BT``, ``column_mask_BV``: text rows and vision columns that have a target; None for all real ones.
    ``paired_P``, ``unpaired_U``: answers that ``answers`` are about, ``[P, ..]`` each, and all others; None for all, and none.
    ``quantised``, ``quantised_answers``: targets that are still a codec's small integers, by the name they will have.
    """

    attention_BHTV: torch.Tensor | None = None
    vision_BVD: torch.Tensor | None = None
    answers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    quantised: Mapping[str, Quantised] = field(default_factory=dict)
    quantised_answers: Mapping[str, Quantised] = field(default_factory=dict)
    other_layers: Mapping[int, torch.Tensor] = field(default_factory=dict)
    quantised_layers: Mapping[int, Quantised] = field(default_factory=dict)
    row_mask_BT: torch.Tensor | None = None
    column_mask_BV: torch.Tensor | None = None
    paired_P: torch.Tensor | None = None
    unpaired_U: torch.Tensor | None = None

    def layer(self, number: int) -> torch.Tensor | None:
        """Attention of one of the teacher's layers, ``[B, H, T, V]``; None where there is none."""
        return self.other_layers.get(number) if number else self.attention_BHTV

    def mask_to_targets(self, batch: Batch) -> Batch:
        """The batch with masks of those text rows and vision columns alone that have a target."""
        if self.row_mask_BT is not None:
            batch = replace(batch, text_mask_BT=batch.text_mask_BT & self.row_mask_BT)
        if self.column_mask_BV is not None:
            batch = replace(batch, vision_mask_BV=batch.vision_mask_BV & self.column_mask_BV)
        return batch

    def to(self, device: torch.device | str) -> "Targets":
        """The targets on another device (asynchronously from pinned memory)."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Targets":
        """Page-locked copies, so that :meth:`to` need not wait."""
        return self._map(lambda t: t.pin_memory())

    def dequantise(self) -> "Targets":
        """The targets as the losses see them, on the device they lie on: what is quantised becomes float32.

        What a cache stores exactly keeps its type: ids and codes are integers.
        """
        aligned = {name: target.dequantise() for name, target in self.quantised.items()}
        answers = {
            name: target.parts["values"].view(target.shape) if target.codec == "exact" else target.dequantise()
            for name, target in self.quantised_answers.items()
        }
        layers = {number: target.dequantise() for number, target in self.quantised_layers.items()}
        return replace(
            self,
            quantised={},
            quantised_answers={},
            quantised_layers={},
            answers={**self.answers, **answers},
            other_layers={**self.other_layers, **layers},
            **aligned,
        )

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else function(tensor)

        return Targets(
            of(self.attention_BHTV),
            of(self.vision_BVD),
            {name: function(tensor) for name, tensor in self.answers.items()},
            {name: target.map(function) for name, target in self.quantised.items()},
            {name: target.map(function) for name, target in self.quantised_answers.items()},
            {number: function(tensor) for number, tensor in self.other_layers.items()},
            {number: target.map(function) for number, target in self.quantised_layers.items()},
            of(self.row_mask_BT),
            of(self.column_mask_BV),
            of(self.paired_P),
            of(self.unpaired_U),
        )

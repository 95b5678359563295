"""Teacher targets of a batch.

Shapes: B samples, H teacher heads, T text rows, V vision columns, D teacher width, A answers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from alignkd.dequantise import Quantised


@dataclass(frozen=True)
class Targets:
    """What the teacher gave for a batch, padded as the batch is; a target that the cache lacks is None.

    ``attention_BHTV``: first-layer probabilities (H = 1 for a head mean). ``vision_BVD``: projected vision tokens.
    ``answers``: fields of :mod:`alignkd.logits`, ``[A, ..]`` each.
    ``quantised``, ``quantised_answers``: targets that are still a codec's small integers, by the name they will have.
    """

    attention_BHTV: torch.Tensor | None = None
    vision_BVD: torch.Tensor | None = None
    answers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    quantised: Mapping[str, Quantised] = field(default_factory=dict)
    quantised_answers: Mapping[str, Quantised] = field(default_factory=dict)

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
        return replace(self, quantised={}, quantised_answers={}, answers={**self.answers, **answers}, **aligned)

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        return Targets(
            None if self.attention_BHTV is None else function(self.attention_BHTV),
            None if self.vision_BVD is None else function(self.vision_BVD),
            {name: function(tensor) for name, tensor in self.answers.items()},
            {name: target.map(function) for name, target in self.quantised.items()},
            {name: target.map(function) for name, target in self.quantised_answers.items()},
        )

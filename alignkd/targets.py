"""Teacher targets of a batch, and how logits become top-k targets.

Shapes: B samples, H teacher heads, T text rows, V vision columns, D teacher width, A answers, K kept logits, N vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import torch

from alignkd.dequantise import Quantised


@dataclass(frozen=True)
class Targets:
    """What the teacher gave for a batch, padded as the batch is; a target that the cache lacks is None.

    ``attention_BHTV``: first-layer probabilities (H = 1 for a head mean). ``vision_BVD``: projected vision tokens.
    ``topk_ids_AK``, ``topk_logprobs_AK``, ``tail_logmass_A``: log-probabilities of the K likeliest tokens at the cache's
    temperature, and the log of the mass of all others; they sum to one.
    ``quantised``: targets that are still a codec's small integers, by the name of their field here.
    """

    attention_BHTV: torch.Tensor | None = None
    vision_BVD: torch.Tensor | None = None
    topk_ids_AK: torch.Tensor | None = None
    topk_logprobs_AK: torch.Tensor | None = None
    tail_logmass_A: torch.Tensor | None = None
    quantised: Mapping[str, Quantised] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Targets":
        """The targets on another device (asynchronously from pinned memory)."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> "Targets":
        """Page-locked copies, so that :meth:`to` need not wait."""
        return self._map(lambda t: t.pin_memory())

    def dequantise(self) -> "Targets":
        """The targets as the losses see them: what is quantised becomes float32, on the device it lies on."""
        return replace(self, quantised={}, **{name: target.dequantise() for name, target in self.quantised.items()})

    def _map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "quantised"}
        quantised = {name: target.map(function) for name, target in self.quantised.items()}
        return replace(self, quantised=quantised, **{k: function(v) for k, v in tensors.items() if v is not None})


def topk_targets(logits_AN: torch.Tensor, k: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k likeliest tokens, their exact log-probabilities, and the log of the remaining mass.

    Returns ids ``[A, K]`` (int64), log-probabilities ``[A, K]`` and log tail mass ``[A]`` (float32 or wider; -inf when K
    is the whole vocabulary). K is at most the vocabulary.
    """
    scaled_AN = logits_AN.float() if logits_AN.dtype in (torch.bfloat16, torch.float16) else logits_AN
    logprobs_AN = (scaled_AN / temperature).log_softmax(dim=1)
    k = min(k, logits_AN.shape[1])
    logprobs_AK, ids_AK = logprobs_AN.topk(k, dim=1)
    # Summed over the tail itself: 1 - sum(kept) would lose a small tail to rounding.
    tail_A = logprobs_AN.scatter(1, ids_AK, -torch.inf).logsumexp(dim=1)
    return ids_AK, logprobs_AK, tail_A


def renormalise(topk_logprobs_AK: torch.Tensor, tail_logmass_A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Undo the rounding of stored log-probabilities: kept tokens and tail together sum to one again.

    Nothing is dropped: the tail keeps its share. A divergence between two distributions is then never negative.
    """
    total_A = torch.cat([topk_logprobs_AK, tail_logmass_A[:, None]], dim=1).logsumexp(dim=1)
    return topk_logprobs_AK - total_A[:, None], tail_logmass_A - total_A

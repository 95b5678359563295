"""Weights of the terms that are learned with the student, after Beta-KD.

Beta-KD (arXiv 2603.21426, CVPR 2026) weights each term by a precision ``beta`` and adds ``-log beta``, which keeps a precision
from going to zero for free; its form with one precision a term is the uncertainty weighting of Kendall et al. (arXiv
1705.07115). With ``beta = exp(-s)`` and a recipe's own weight w of a term L:

    sum of beta * w * L + s

``s`` is 0 at first, where the loss is that of the recipe, and best where ``beta * w * L = 1``: every term then weighs the same,
and the recipe's weights are a matter of the start alone. What differs from Beta-KD: both of its summands are halved, which
AdamW does not notice; ``s`` is held between -5 and 5 by a tanh and not by a cut, which would end its gradient; its other
form, which predicts precisions from the teacher's visual features, is not here.

Shapes: K learned weights.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from alignkd.targets.logit_settings import DIVERGENCE_NAMES

GROUPS = {
    **{name: name for name in ("supervised", *DIVERGENCE_NAMES, "attention")},
    **dict.fromkeys(("vision_all", "vision_focus"), "vision"),
}
"""The learned weight of each term: L_V has one, within which its focus keeps the recipe's share. Others have their own."""

_LIMIT = 5.0


class LearnedWeights(nn.Module):
    """One precision for each of some groups of terms."""

    def __init__(self, terms: Iterable[str]) -> None:
        super().__init__()
        self.groups = tuple(dict.fromkeys(_group(term) for term in terms))
        self.log_variances = nn.Parameter(torch.zeros(len(self.groups)))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The precisions, and the logs of their inverses: ``[K]`` each, float32."""
        log_variances_K = _LIMIT * (self.log_variances.float() / _LIMIT).tanh()
        return (-log_variances_K).exp(), log_variances_K

    def of_terms(self, precisions_K: torch.Tensor, terms: Iterable[str]) -> dict[str, torch.Tensor]:
        """The precision of each term."""
        return {term: precisions_K[self.groups.index(_group(term))] for term in terms}

    def of_weights(self, weights: Mapping[str, float]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The precision of each term whose weight is above 0, and the penalty."""
        precisions_K, log_variances_K = self()
        return self.of_terms(precisions_K, [name for name, weight in weights.items() if weight > 0]), log_variances_K.sum()


def _group(term: str) -> str:
    return GROUPS.get(term, term)


def as_numbers(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars as numbers on the host; one wait for the device, if there are any."""
    if not scalars:
        return {}
    return dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))


def learned_part(
    precisions: Mapping[str, torch.Tensor], weighted: Mapping[str, torch.Tensor], penalty: torch.Tensor
) -> torch.Tensor:
    """What the loss gains for the precisions' sake: the ``penalty``, and their gradient through terms given as numbers.

    ``weighted``: each term with the recipe's weight, by its name. But for the penalty its value is zero.
    """
    moved = [(precision - precision.detach()) * weighted[name].detach() for name, precision in precisions.items()]
    return sum(moved, start=penalty)

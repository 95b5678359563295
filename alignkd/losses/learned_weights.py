"""Weights of the terms that are trained with the student, after Beta-KD.

Beta-KD (arXiv 2603.21426, CVPR 2026) weights each term by a precision ``beta`` and adds ``-log beta``, which keeps a precision
from going to zero for free; its form with one precision a term is the uncertainty weighting of Kendall et al. (arXiv
1705.07115). With ``beta = exp(-s)`` and a recipe's own weight w of a term L:

    sum of beta * w * L + s

``s`` starts at 0, where the loss is that of the recipe. It is best where ``beta * w * L = 1``: every term then weighs the same,
and the recipe's weights matter at the start only. Differences from Beta-KD: both of its summands are halved, which has no
effect under AdamW; ``s`` is kept between -5 and 5 by a tanh and not by clamping, which would stop its gradient; its other
form, which predicts precisions from the teacher's visual features, is not implemented.

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
"""The learned weight of each term: L_V has one, within which its focus keeps the recipe's share. Terms from
outside the package have one each."""

_LIMIT = 5.0


class LearnedWeights(nn.Module):
    """One precision for each group of terms."""

    def __init__(self, terms: Iterable[str]) -> None:
        super().__init__()
        self.groups = tuple(dict.fromkeys(_group(term) for term in terms))
        self.log_variances = nn.Parameter(torch.zeros(len(self.groups)))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The precisions, and the logarithms of their inverses: ``[K]`` each, float32."""
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
    """The part of the loss that trains the precisions: the ``penalty``, and their gradient through terms given as numbers.

    ``weighted``: each term with the recipe's weight, by its name. Except for the penalty its value is zero.
    """
    gradients = [(precision - precision.detach()) * weighted[name].detach() for name, precision in precisions.items()]
    return sum(gradients, start=penalty)

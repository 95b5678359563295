"""How much each answer token counts in the terms that compare answer distributions, by the teacher's advantage.

After VA-OPD (arXiv 2605.21924): within a sample, ``lambda * mean over its top share + (1 - lambda) * mean over its rest``,
where the top share are the tokens for which the teacher takes most from the image. Here that is a weight for each token whose
mean over the sample is 1, so that samples count as they do without weights, and batches change nothing.

Shapes: B samples, A answers.
"""

import torch

from alignkd.losses.recipes import Recipe

_SLACK = 1e-9
"""0.3 * 10 in floating point may be a little less than 3."""


def recipe_token_weights(
    recipe: Recipe, advantage_A: torch.Tensor, samples_A: torch.Tensor, samples: int
) -> torch.Tensor | None:
    """As :func:`token_weights`, as the recipe has it; None where it lets all tokens count equally."""
    if recipe.token_weighting == "uniform":
        return None
    return token_weights(advantage_A, samples_A, samples, top_share=recipe.token_top_share, top_weight=recipe.token_lambda)


def token_weights(
    advantage_A: torch.Tensor, samples_A: torch.Tensor, samples: int, *, top_share: float, top_weight: float
) -> torch.Tensor:
    """The weight of each answer token, float32 ``[A]``; nothing waits for the device.

    ``samples_A``: the sample of each answer, ascending. A sample with n tokens has ``floor(top_share * n)`` of them in its top,
    one at least; of equal advantages the first comes first. ``top_weight``: lambda. All weights of a sample are 1 where none of
    its advantages is above 0, which is so for samples without an image, and where its top is all it has.
    """
    ones_A = torch.ones_like(advantage_A, dtype=torch.float32)
    count_B = ones_A.new_zeros(samples).index_add(0, samples_A, ones_A)
    top_B = (count_B.double() * top_share + _SLACK).floor().clamp(min=1).float()
    start_B = count_B.cumsum(0) - count_B
    # Both sorts are stable: by advantage, then by sample.
    order_A = advantage_A.sort(descending=True, stable=True).indices
    order_A = order_A[samples_A[order_A].sort(stable=True).indices]
    place_A = torch.empty_like(ones_A).scatter(0, order_A, torch.arange(len(ones_A), device=ones_A.device, dtype=torch.float32))
    is_top_A = place_A - start_B[samples_A] < top_B[samples_A]
    gained_B = advantage_A.new_zeros(samples).index_add(0, samples_A, advantage_A)
    rest_B = (count_B - top_B).clamp(min=1)
    of_top_B, of_rest_B = top_weight * count_B / top_B, (1 - top_weight) * count_B / rest_B
    weight_A = torch.where(is_top_A, of_top_B[samples_A], of_rest_B[samples_A])
    is_weighted_B = (gained_B > 0) & (count_B > top_B)
    return torch.where(is_weighted_B[samples_A], weight_A, ones_A)

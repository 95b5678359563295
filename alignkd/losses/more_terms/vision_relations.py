"""How vision tokens relate to each other: the Gram matrices of teacher and student, compared (LLaVA-KD, arXiv 2410.16236).

Both models may have any width: a Gram matrix has only the number of vision tokens. LLaVA-KD compares states of the last layer
at vision positions; here it is the projected vision tokens, which are what a cache holds.

Shapes: B samples, V vision columns, D width.
"""

import torch
from transformers.utils.generic import maybe_autocast

from alignkd.losses.contract import TermInputs
from alignkd.losses.dtypes import at_least_float32


def vision_relations(inputs: TermInputs) -> torch.Tensor:
    """``1 - cos`` of the two Gram matrices of normalised vision tokens, of each sample ``[B]``; 0 where there are no tokens.

    In float32 at least. Memory: V times V numbers a sample, for 144 tokens 83 kB.
    """
    targets, mask_BV = inputs.targets, inputs.batch.vision_mask_BV
    assert targets.vision_BVD is not None
    with maybe_autocast(mask_BV.device.type, enabled=False):
        student_BG, teacher_BG = (_gram(tokens, mask_BV) for tokens in (inputs.student_vision_BVD, targets.vision_BVD))
        # Both are at least 1 long where there is a token, since each token has a cosine of 1 with itself.
        lengths_B = torch.linalg.vector_norm(student_BG, dim=1) * torch.linalg.vector_norm(teacher_BG, dim=1)
        value_B = 1 - (student_BG * teacher_BG).sum(dim=1) / lengths_B.clamp(min=1e-6)
    masked_B: torch.Tensor = value_B.masked_fill(~mask_BV.any(dim=1), 0.0)
    return masked_B


def _gram(tokens_BVD: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    """The cosines of all pairs of tokens ``[B, V * V]``, 0 at padding."""
    tokens_BVD = at_least_float32(tokens_BVD).masked_fill(~mask_BV[:, :, None], 0.0)
    # An addition, so that a token of zeros has the gradient zero and not NaN.
    lengths_BV1 = (tokens_BVD.square().sum(dim=2, keepdim=True) + 1e-12).sqrt()
    unit_BVD = tokens_BVD / lengths_BV1
    return (unit_BVD @ unit_BVD.transpose(1, 2)).flatten(1)

"""The terms of Align-KD, one pure function each; :mod:`alignkd.losses.attention_distance` has other distances of attention.

Total (figure of arXiv 2412.01282): ``L = L_sup + L_RKLD + L_1-A(t-v) + L_V``, with ``L_V`` of L_V-all and L_V-focus.

Attention and vision terms are averaged within each sample here, and over the samples that have an image by the objective, so
that padding and neighbours in the batch change nothing. Supervised and logit terms are averaged over answer tokens: they are in
:mod:`alignkd.losses.answer_loss`, L_RKLD and its relatives in :mod:`alignkd.targets.logits`.

Shapes: B samples, H heads, T text rows, V vision columns, D width, A answers, N vocabulary.
"""

import torch

from alignkd.losses.dtypes import at_least_float32


def attention_loss(
    student_BHTV: torch.Tensor,
    teacher_BHTV: torch.Tensor,
    text_mask_BT: torch.Tensor,
    vision_mask_BV: torch.Tensor,
    *,
    relative_to_uniform: bool,
) -> torch.Tensor:
    """L_1-A(t-v) of each sample, ``[B]``: mean squared error of first-layer text-to-vision attention, heads already mapped.

    Zero for samples without text after an image.

    ``relative_to_uniform`` measures each probability relative to 1 / V, which multiplies the error by V squared: entries are of
    the order of 1 / V, so that the plain error (1e-5 and below) would be negligible beside a cross-entropy.
    """
    mask_BTV = text_mask_BT[:, :, None] & vision_mask_BV[:, None, :]
    entries_B = mask_BTV.sum(dim=(1, 2))
    error_BTV = (at_least_float32(student_BHTV) - at_least_float32(teacher_BHTV)).square().mean(dim=1)
    loss_B = (error_BTV * mask_BTV).sum(dim=(1, 2)) / entries_B.clamp(min=1)
    if relative_to_uniform:
        loss_B = loss_B * vision_mask_BV.sum(dim=1).square()
    return loss_B


def focus_mask(attention_BHTV: torch.Tensor, vision_mask_BV: torch.Tensor, k: int) -> torch.Tensor:
    """The k vision tokens of each sample to which the teacher's text attends most, ``[B, V]`` of bool.

    Score: first-layer attention summed over text rows and averaged over heads. All tokens when a sample has k or fewer.
    """
    score_BV = attention_BHTV.float().sum(dim=2).mean(dim=1).masked_fill(~vision_mask_BV, -1.0)
    chosen = score_BV.topk(min(k, score_BV.shape[1]), dim=1).indices
    return torch.zeros_like(vision_mask_BV).scatter(1, chosen, True) & vision_mask_BV


def vision_loss(
    student_BVD: torch.Tensor,
    teacher_BVD: torch.Tensor,
    token_mask_BV: torch.Tensor,
    vision_mask_BV: torch.Tensor,
    *,
    relative_to_variance: bool,
) -> torch.Tensor:
    """L_V of each sample, ``[B]``, over the tokens of ``token_mask_BV``: mean squared error, widths already mapped.

    Zero for samples without an image.

    ``relative_to_variance`` divides by the variance of the teacher's tokens of that sample (over all its tokens and
    features): a constant would reach 1. Where the variance is zero, nothing is divided.
    """
    teacher_BVD = at_least_float32(teacher_BVD)
    error_BV = (at_least_float32(student_BVD) - teacher_BVD).square().mean(dim=2)
    chosen_B = token_mask_BV.sum(dim=1)
    loss_B = (error_BV * token_mask_BV).sum(dim=1) / chosen_B.clamp(min=1)
    if relative_to_variance:
        loss_B = loss_B / _variance(teacher_BVD, vision_mask_BV).clamp(min=torch.finfo(torch.float32).tiny)
    return loss_B


def _variance(tokens_BVD: torch.Tensor, mask_BV: torch.Tensor) -> torch.Tensor:
    count_B = (mask_BV.sum(dim=1) * tokens_BVD.shape[2]).clamp(min=1)
    mask_BV1 = mask_BV[:, :, None]
    mean_B = (tokens_BVD * mask_BV1).sum(dim=(1, 2)) / count_B
    centred_BVD = (tokens_BVD - mean_B[:, None, None]) * mask_BV1
    variance_B = centred_BVD.square().sum(dim=(1, 2)) / count_B
    # A sample without an image has no variance, nor have equal tokens, which an untrained Gemma 3 gives: 1 keeps the division
    # finite, and the loss of a sample without an image zero.
    return torch.where(variance_B > 0, variance_B, torch.ones_like(mean_B))

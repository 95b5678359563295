"""How far a student's attention is from a teacher's: on which rows, and by which distance.

Every distance is averaged over heads and chosen rows within each sample; padding and neighbours in the batch change nothing.
The squared error is :func:`alignkd.losses.terms.attention_loss`, the paper's term. The others compare where a row looks within
the image, and not how much of its mass is there.

Shapes: B samples, S positions, H heads, T text rows, V vision columns.
"""

import torch

from alignkd.inputs.batch import Batch
from alignkd.losses.dtypes import at_least_float32
from alignkd.losses.recipes import AttentionDistance, AttentionRows
from alignkd.losses.terms import attention_loss

_TINY = 1e-30
"""Added to probabilities before a logarithm or a division: changes no number above 1e-22, and keeps zeros finite."""

_LEAST = 1e-20
"""A row whose probabilities are all smaller has no direction: its gradient would be out of the range of float32."""


def chosen_rows(batch: Batch, rows: AttentionRows) -> torch.Tensor:
    """The text rows that are compared, ``[B, T]`` of bool.

    ``text``: all after the first image. ``answer``: those that predict a supervised token, one before the token itself;
    ``instruction``: the others, template text among them.
    """
    if rows == "text":
        return batch.text_mask_BT
    predicts = torch.zeros_like(batch.attention_mask_BS).flatten()
    predicts[batch.answer_positions_A] = True
    predicts_BT = predicts.view_as(batch.attention_mask_BS).gather(1, batch.text_rows_BT)
    return batch.text_mask_BT & (predicts_BT if rows == "answer" else ~predicts_BT)


def attention_distance(
    student_BHTV: torch.Tensor,
    teacher_BHTV: torch.Tensor,
    row_mask_BT: torch.Tensor,
    vision_mask_BV: torch.Tensor,
    distance: AttentionDistance,
    *,
    relative_to_uniform: bool,
) -> torch.Tensor:
    """The distance of each sample, ``[B]``, heads already mapped; zero for samples without a chosen row or an image.

    ``relative_to_uniform`` affects ``mse`` only: the other distances do not depend on the number of vision columns.
    """
    if distance == "mse":
        return attention_loss(student_BHTV, teacher_BHTV, row_mask_BT, vision_mask_BV, relative_to_uniform=relative_to_uniform)
    columns_B11V = vision_mask_BV[:, None, None, :]
    student_BHTV, teacher_BHTV = at_least_float32(student_BHTV) * columns_B11V, at_least_float32(teacher_BHTV) * columns_B11V
    of_row = _row_divergences if distance == "kl" else _row_angles
    row_BHT = of_row(student_BHTV, teacher_BHTV, vision_mask_BV) * row_mask_BT[:, None]
    rows_B = (row_mask_BT & vision_mask_BV.any(dim=1, keepdim=True)).sum(dim=1)
    return row_BHT.mean(dim=1).sum(dim=1) / rows_B.clamp(min=1)


def _row_divergences(student_BHTV: torch.Tensor, teacher_BHTV: torch.Tensor, vision_mask_BV: torch.Tensor) -> torch.Tensor:
    """KL of teacher and student, ``[B, H, T]``, each row a distribution over the vision columns.

    Zero where the teacher's row has no mass on the image: it then says nothing about where to look.
    """
    columns_B11 = vision_mask_BV.sum(dim=1)[:, None, None]
    mass_BHT1 = teacher_BHTV.sum(dim=3, keepdim=True).clamp(min=_TINY)
    ratio_BHTV = _logprobs(teacher_BHTV, columns_B11) - _logprobs(student_BHTV, columns_B11)
    return (teacher_BHTV / mass_BHT1 * ratio_BHTV).sum(dim=3)


def _logprobs(attention_BHTV: torch.Tensor, columns_B11: torch.Tensor) -> torch.Tensor:
    mass_BHT = attention_BHTV.sum(dim=3) + columns_B11.clamp(min=1) * _TINY
    return (attention_BHTV + _TINY).log() - mass_BHT.log()[..., None]


def _row_angles(student_BHTV: torch.Tensor, teacher_BHTV: torch.Tensor, vision_mask_BV: torch.Tensor) -> torch.Tensor:
    """One minus the cosine of teacher and student, ``[B, H, T]``; zero where the teacher's row is."""
    if not vision_mask_BV.shape[1]:
        return (student_BHTV * teacher_BHTV).sum(dim=3)
    student_BHTV, teacher_BHTV = _unit(student_BHTV), _unit(teacher_BHTV)
    # Half the squared distance of unit vectors: exactly zero for equal ones, where one minus the product is not.
    angle_BHT = (student_BHTV - teacher_BHTV).square().sum(dim=3) / 2
    angle_BHT = angle_BHT.masked_fill(~student_BHTV.detach().any(dim=3), 1.0)
    return angle_BHT.masked_fill(~teacher_BHTV.detach().any(dim=3), 0.0)


def _unit(attention_BHTV: torch.Tensor) -> torch.Tensor:
    """Rows of length one; zero where all probabilities are too small for a direction."""
    largest_BHT1 = attention_BHTV.detach().abs().amax(dim=3, keepdim=True)
    # Divided by the largest first: squares of small probabilities would be out of the range of float32.
    scaled_BHTV = attention_BHTV * (largest_BHT1 >= _LEAST) / largest_BHT1.clamp(min=_LEAST)
    length_BHT1: torch.Tensor = torch.linalg.vector_norm(scaled_BHTV, dim=3, keepdim=True)
    return scaled_BHTV / length_BHT1.clamp(min=1)

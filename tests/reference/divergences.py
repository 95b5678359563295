"""How far the student's answer distribution is from the teacher's, outcome by outcome.

Outcomes are the whole vocabulary, or the tokens that are known and one bucket for the mass of all others. Both sides are
log-probabilities; an outcome may be impossible (-inf) for the teacher alone only where it is impossible for the student, too.

Shapes: A answers, X outcomes.
"""

import math
from collections.abc import Callable

import torch

Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def reverse_kl(student_AX: torch.Tensor, teacher_AX: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher), ``[A]``: L_RKLD of Align-KD (figure of arXiv 2412.01282)."""
    return _kl(student_AX, teacher_AX)


def forward_kl(student_AX: torch.Tensor, teacher_AX: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student), ``[A]``: the cross-entropy of Hinton's distillation, less the teacher's entropy."""
    return _kl(teacher_AX, student_AX)


def jensen_shannon(student_AX: torch.Tensor, teacher_AX: torch.Tensor) -> torch.Tensor:
    """Mean of the KL of both to their middle, ``[A]``; at most log 2."""
    middle_AX = torch.logaddexp(student_AX, teacher_AX) - math.log(2)
    return (_kl(student_AX, middle_AX) + _kl(teacher_AX, middle_AX)) / 2


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
}


def _kl(of_AX: torch.Tensor, from_AX: torch.Tensor) -> torch.Tensor:
    # Replaced before the subtraction, not after: the gradient of inf - inf would be NaN even where it is masked.
    possible_AX = of_AX > -torch.inf
    of_AX, from_AX = (t.masked_fill(~possible_AX, 0.0) for t in (of_AX, from_AX))
    return (of_AX.exp() * (of_AX - from_AX) * possible_AX).sum(dim=1)

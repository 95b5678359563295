"""Each divergence and its gradient, outcome by outcome, written by hand.

A divergence is ``L = sum_o F(Q_o, P_o)`` over outcomes of student Q and teacher P. With ``slope_o = Q_o dF/dQ_o`` and q the
softmax of ``z / t``, the gradient at the logit of a token that is an outcome by itself is
``dL/dz_i = (slope_i - q_i sum_o slope_o) / t``; tokens of a bucket share its slope in proportion to q.

The formulas are those of :mod:`alignkd.logits.divergences`. As there, an outcome that is impossible for both sides counts
nothing, and one that is impossible for the teacher alone makes reverse KL infinite.

Shapes: C answers, X outcomes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Sides:
    """Probabilities of student and teacher, and the log of their ratio."""

    q_CX: torch.Tensor
    p_CX: torch.Tensor
    ratio_CX: torch.Tensor


Form = Callable[[Sides], tuple[torch.Tensor, torch.Tensor]]
"""To losses ``[C]`` and slopes ``[C, X]``."""

BIG = 1e30
"""In place of infinity beside a probability that may be zero: their product is then zero, not NaN."""


def sides_of(student_CX: torch.Tensor, teacher_CX: torch.Tensor) -> Sides:
    """From log-probabilities, which are overwritten; the ratio of what is impossible for both is one."""
    neither_CX = (student_CX == -torch.inf) & (teacher_CX == -torch.inf)
    ratio_CX = (student_CX - teacher_CX).masked_fill_(neither_CX, 0.0)
    return Sides(student_CX.exp_(), teacher_CX.exp_(), ratio_CX)


def reverse_kl(sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """``F = Q log(Q / P)``."""
    terms_CX = sides.q_CX * sides.ratio_CX.clamp(min=-BIG)
    return terms_CX.sum(dim=1), terms_CX + sides.q_CX


def forward_kl(sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """``F = P log(P / Q)``."""
    return -(sides.p_CX * sides.ratio_CX.clamp(max=BIG)).sum(dim=1), -sides.p_CX


def jensen_shannon(sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """``F = (Q log(Q / M) + P log(P / M)) / 2`` with ``M = (P + Q) / 2``."""
    half_q_CX = sides.q_CX * (logsigmoid(sides.ratio_CX) + math.log(2)).clamp(min=-BIG) / 2
    half_p_CX = sides.p_CX * (logsigmoid(-sides.ratio_CX) + math.log(2)).clamp(min=-BIG) / 2
    return (half_q_CX + half_p_CX).sum(dim=1), half_q_CX


FORMS: dict[str, Form] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jensen_shannon": jensen_shannon}

"""Each divergence and its gradient, outcome by outcome, written by hand.

A divergence is ``L = sum_o F(Q_o, P_o)`` over outcomes of student Q and teacher P. With ``slope_o = Q_o dF/dQ_o`` and q the
softmax of ``z / t``, the gradient at the logit of a token that is an outcome by itself is
``dL/dz_i = (slope_i - q_i sum_o slope_o) / t``; tokens of a bucket share its slope in proportion to q.

``tests/reference/divergences.py`` has the plain formulas. As there, an outcome that is impossible for both sides counts
nothing, and one that is impossible for the teacher alone makes reverse KL infinite.

Shapes: C answers, X outcomes.
"""

import math
from collections.abc import Callable

import torch
from torch.nn.functional import logsigmoid


class Sides:
    """Log-probabilities ``[C, X]`` of student and teacher, and what the divergences make of them."""

    def __init__(self, student_CX: torch.Tensor, teacher_CX: torch.Tensor) -> None:
        self.ratio_CX = student_CX - teacher_CX
        self.q_CX = student_CX.exp()
        self._teacher_CX = teacher_CX

    def p(self) -> torch.Tensor:
        """The teacher's probabilities, computed when asked for: not every divergence needs them."""
        return self._teacher_CX.exp()


Form = Callable[[Sides], tuple[torch.Tensor, torch.Tensor]]
"""Gives losses ``[C]`` and slopes ``[C, X]``, in a new tensor."""


def reverse_kl(sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """``F = Q log(Q / P)``."""
    terms_CX = times(sides.q_CX, sides.ratio_CX)
    return terms_CX.sum(dim=1), terms_CX.add_(sides.q_CX)


def forward_kl(sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """``F = P log(P / Q)``."""
    p_CX = sides.p()
    return -times(p_CX, sides.ratio_CX).sum(dim=1), p_CX.neg_()


def jensen_shannon(sides: Sides) -> tuple[torch.Tensor, torch.Tensor]:
    """``F = (Q log(Q / M) + P log(P / M)) / 2`` with ``M = (P + Q) / 2``."""
    half_q_CX = times(sides.q_CX / 2, logsigmoid(sides.ratio_CX) + math.log(2))
    half_p_CX = times(sides.p() / 2, logsigmoid(-sides.ratio_CX) + math.log(2))
    return (half_q_CX + half_p_CX).sum(dim=1), half_q_CX


def times(probability_CX: torch.Tensor, log_CX: torch.Tensor) -> torch.Tensor:
    """The product; zero where the probability is zero, whatever the log is."""
    return (probability_CX * log_CX).masked_fill_(probability_CX == 0, 0.0)


FORMS: dict[str, Form] = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "jensen_shannon": jensen_shannon}

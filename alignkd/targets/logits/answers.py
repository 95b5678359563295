"""What a codec's targets say of the teacher at a few answers, as losses with gradients written by hand need it.

Shapes: A answers, X known tokens, N vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draws:
    """How drawn tokens, which are among the known ones, enter forward KL: a cross-entropy with sparse weights.

    ``repeats_AX``: True where an id is already known further left; it counts nothing there, and ``weights_AX`` are zero.
    ``negentropy_A``: the constant that forward KL adds to the cross-entropy.
    """

    repeats_AX: torch.Tensor
    weights_AX: torch.Tensor
    negentropy_A: torch.Tensor


@dataclass(frozen=True)
class TeacherAnswers:
    """Tokens known one by one, the mass of all others, and the shape of that tail, if there is one.

    ``logprobs_AX``: of the tokens ``ids_AX``; -inf leaves a token out of every divergence. ``tail_A``: log mass of all other
    tokens. ``tail_logits_AN``: logits that give each of them its share, before the temperature; the caller may overwrite
    them. Without them the tail is one bucket.
    """

    ids_AX: torch.Tensor
    logprobs_AX: torch.Tensor
    tail_A: torch.Tensor
    tail_logits_AN: torch.Tensor | None = None
    draws: Draws | None = None


TeacherReader = Callable[[slice], TeacherAnswers]

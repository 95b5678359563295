"""The student seen through the teacher's projector: ``P_s(P_t(z))``, frozen P_t, one trained linear map P_s to its width.

CompoDistill (arXiv 2510.12184) calls this the teacher's adapter: the student starts from vision tokens that a language model
reads already, and only a change of basis is left to learn.

Shapes: N images, P patches, C tower width, V vision tokens an image, D_T teacher width, D student width.
"""

from typing import Any

import torch
from torch import nn


class TeacherProjector(nn.Module):
    """Vision tokens of tower features ``[N, P, C] -> [N, V, D]``.

    ``teacher``: P_t, ``[N, P, C] -> [N, V, D_T]``; it never trains, whatever is asked of the whole. ``map``: P_s, drawn as
    PyTorch draws a linear layer, as is the last layer of a projector that starts anew: its outputs have the scale that fresh
    projectors give a language model.
    """

    def __init__(self, teacher: nn.Module, teacher_width: int, width: int) -> None:
        super().__init__()
        self.teacher = teacher
        self.map = nn.Linear(teacher_width, width)
        self.requires_grad_(True)

    def requires_grad_(self, requires_grad: bool = True) -> "TeacherProjector":
        """Let P_s train, or not; P_t stays frozen."""
        super().requires_grad_(requires_grad)
        self.teacher.requires_grad_(False)
        return self

    def forward(self, features: torch.Tensor) -> Any:
        """See the class."""
        with torch.no_grad():
            tokens = self.teacher(features)
        return self.map(tokens)

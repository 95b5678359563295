"""Maps between teacher and student where head counts and widths differ.

A trained map on the teacher's side can collapse: teacher and student can agree on zero. So by default

* heads: each student head is compared with a **convex mixture** of teacher heads. A row of a mixture of attention rows is still
  a sub-distribution with the teacher's total mass on the image; no setting of the weights makes it small.
* widths: the student's vision tokens are **lifted** to the teacher's width; the target itself is not changed.

The 1 x 1 convolution over heads and the teacher-side projection of the released Align-KD code are here for comparison;
unlike there, they are trained.

Shapes: B samples, H heads, T text rows, V vision columns, D width.
"""

import torch
from torch import nn
from torch.nn import functional

from alignkd.errors import ConfigError
from alignkd.losses.recipes import HeadMap, WidthMap


class HeadMixture(nn.Module):
    """Teacher heads to student heads by a softmax-weighted mixture: ``[B, Ht, T, V] -> [B, Hs, T, V]``."""

    def __init__(self, teacher_heads: int, student_heads: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(_grouped(teacher_heads, student_heads) * 2.0)

    def forward(self, attention_BHTV: torch.Tensor) -> torch.Tensor:
        """Mix heads."""
        return torch.einsum("sh,bhtv->bstv", self.logits.float().softmax(dim=1), attention_BHTV.float())


class HeadConvolution(nn.Module):
    """The released code's 1 x 1 convolution over heads: any weights, so it can shrink the target."""

    def __init__(self, teacher_heads: int, student_heads: int) -> None:
        super().__init__()
        weights = _grouped(teacher_heads, student_heads)
        self.weight = nn.Parameter(weights / weights.sum(dim=1, keepdim=True))
        self.bias = nn.Parameter(torch.zeros(student_heads))

    def forward(self, attention_BHTV: torch.Tensor) -> torch.Tensor:
        """Combine heads: ``[B, Ht, T, V] -> [B, Hs, T, V]``."""
        combined_BHTV = torch.einsum("sh,bhtv->bstv", self.weight.float(), attention_BHTV.float())
        return combined_BHTV + self.bias.float()[:, None, None]


class HeadMean(nn.Module):
    """The head mean of both sides, as in the first release: no parameters."""

    def forward(self, attention_BHTV: torch.Tensor) -> torch.Tensor:
        """Average heads: ``[B, H, T, V] -> [B, 1, T, V]``."""
        return attention_BHTV.mean(dim=1, keepdim=True)


def _grouped(teacher_heads: int, student_heads: int) -> torch.Tensor:
    """Initial weights ``[Hs, Ht]`` of 0 and 1: each student head takes its share of the teacher's heads, at least one."""
    weights = torch.zeros(student_heads, teacher_heads)
    for student in range(student_heads):
        first = student * teacher_heads // student_heads
        end = (student + 1) * teacher_heads // student_heads
        weights[student, first : max(end, first + 1)] = 1
    return weights


class WidthAdapter(nn.Module):
    """Map vision tokens of both sides to one width: ``(student [.., Ds], teacher [.., Dt]) -> both [.., D]``.

    ``lift``: a trained linear map of the student to the teacher's width. ``isometry``: a fixed map with orthonormal rows or
    columns between the widths, applied to the wider side. ``projection``: a trained map of the teacher to the student's
    width, which can collapse.
    """

    basis: torch.Tensor

    def __init__(self, teacher_width: int, student_width: int, kind: WidthMap) -> None:
        super().__init__()
        self.kind = kind
        if kind == "lift":
            self.map = nn.Linear(student_width, teacher_width)
        elif kind == "projection":
            self.map = nn.Linear(teacher_width, student_width)
        else:
            self.register_buffer("basis", _orthonormal(teacher_width, student_width))

    def forward(self, student_BVD: torch.Tensor, teacher_BVD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides at one width."""
        if self.kind == "lift":
            return self.map(student_BVD.to(self.map.weight.dtype)), teacher_BVD
        if self.kind == "projection":
            return student_BVD, self.map(teacher_BVD.to(self.map.weight.dtype))
        if teacher_BVD.shape[-1] >= student_BVD.shape[-1]:
            return student_BVD, functional.linear(teacher_BVD.float(), self.basis.T)
        return functional.linear(student_BVD.float(), self.basis), teacher_BVD


def _orthonormal(rows: int, columns: int) -> torch.Tensor:
    """A fixed ``[rows, columns]`` matrix, orthonormal along its shorter side, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(max(rows, columns), min(rows, columns), generator=generator)
    basis: torch.Tensor = torch.linalg.qr(tall).Q
    return basis if rows >= columns else basis.T.contiguous()


def make_head_map(kind: HeadMap, teacher_heads: int, student_heads: int) -> nn.Module:
    """The head map that a recipe names.

    Raises:
        ConfigError: the targets hold only the head mean, but the recipe compares heads.
    """
    if teacher_heads == 1 and student_heads > 1 and kind != "mean":
        raise ConfigError(
            f"head_map is {kind!r}, which needs every teacher head, but the cache holds their mean;"
            " use --set head_map=mean, or cache with --attention per-head"
        )
    if kind == "mean":
        return HeadMean()
    return {"mixture": HeadMixture, "convolution": HeadConvolution}[kind](teacher_heads, student_heads)

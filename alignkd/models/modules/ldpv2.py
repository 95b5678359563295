"""LDPv2, the projector of MobileVLM V2: two linear layers, a pooled grid, a depthwise convolution for position.

Source: MobileVLM V2 (arXiv 2402.03766, section 3.2); parameter names as in the official checkpoints' ``mm_projector``.

Shapes: N images, P patches (a square grid), C tower width, V = grid * grid vision tokens, D language-model width.
"""

import math

import torch
from torch import nn


class _FeatureTransform(nn.Module):
    """Two linear layers from the tower's width to the language model's."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))

    def forward(self, features_NPC: torch.Tensor) -> torch.Tensor:
        return self.mlp(features_NPC)  # type: ignore[no-any-return]


class _PositionInjection(nn.Module):
    """Depthwise 3 x 3 convolution added to its input: position from the neighbourhood."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(features, features, 3, padding=1, groups=features))

    def forward(self, grid_NDGG: torch.Tensor) -> torch.Tensor:
        return grid_NDGG + self.peg(grid_NDGG)  # type: ignore[no-any-return]


class LdpV2Projector(nn.Module):
    """Project tower features to vision tokens: ``[N, P, C] -> [N, V, D]``.

    ``grid`` is the side of the pooled grid (12 in every published checkpoint, so V = 144).
    """

    def __init__(self, in_features: int, out_features: int, grid: int = 12) -> None:
        super().__init__()
        self.mlp = _FeatureTransform(in_features, out_features)
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.peg = _PositionInjection(out_features)

    def forward(self, features_NPC: torch.Tensor) -> torch.Tensor:
        """Vision tokens of tower features."""
        side = math.isqrt(features_NPC.shape[1])
        assert side * side == features_NPC.shape[1], "LDPv2 needs a square grid of patches"
        tokens_NPD = self.mlp(features_NPC)
        grid_NDGG = self.pool(tokens_NPD.transpose(1, 2).unflatten(2, (side, side)))
        return self.peg(grid_NDGG).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]

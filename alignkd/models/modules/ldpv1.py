"""LDP, the projector of MobileVLM V1: two linear layers and two depthwise blocks, of which the second halves the grid.

Source: MobileVLM (arXiv 2312.16886, section 3.3); the blocks are MobileNetV3's (arXiv 1905.02244) with a layer norm over the
channels in place of batch norm. Parameter names as in the official checkpoints' ``mm_projector``.

Shapes: N images, P patches (a square grid), C tower width, D language-model width, G side of the grid, V vision tokens.
"""

import math

import torch
from torch import nn


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell."""

    def forward(self, grid_NDGG: torch.Tensor) -> torch.Tensor:
        return super().forward(grid_NDGG.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _SqueezeExcite(nn.Module):
    """Weight each channel by two layers over the means of all channels."""

    def __init__(self, features: int) -> None:
        super().__init__()
        reduced = _reduced(features)
        self.fc1 = nn.Conv2d(features, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, features, 1)

    def forward(self, grid_NDGG: torch.Tensor) -> torch.Tensor:
        mean_ND11 = grid_NDGG.mean(dim=(2, 3), keepdim=True)
        weight_ND11 = nn.functional.hardsigmoid(self.fc2(nn.functional.relu(self.fc1(mean_ND11))))
        return grid_NDGG * weight_ND11


def _reduced(features: int) -> int:
    """A quarter of the channels, rounded to a multiple of 8 but to at least nine tenths of it, as MobileNets round."""
    quarter = features // 4
    rounded = max(8, (quarter + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * quarter else rounded + 8


class _Block(nn.Module):
    """Depthwise 3 x 3 convolution, squeeze and excite, 1 x 1 convolution; added to its input where the grid keeps its size."""

    def __init__(self, features: int, stride: int) -> None:
        super().__init__()
        depthwise = nn.Conv2d(features, features, 3, stride, padding=1, groups=features, bias=False)
        pointwise = nn.Conv2d(features, features, 1, bias=False)
        self.adds = stride == 1
        self.block = nn.Sequential(
            nn.Sequential(depthwise, _ChannelNorm(features), nn.Hardswish()),
            _SqueezeExcite(features),
            nn.Sequential(pointwise, _ChannelNorm(features)),
        )

    def forward(self, grid_NDGG: torch.Tensor) -> torch.Tensor:
        out_NDGG: torch.Tensor = self.block(grid_NDGG)
        return grid_NDGG + out_NDGG if self.adds else out_NDGG


class _Downsample(nn.Module):
    """The projector itself; the official names count an identity in front of both parts."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Identity(), nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features)
        )
        self.mb_block = nn.Sequential(nn.Identity(), _Block(out_features, 1), _Block(out_features, 2))

    def forward(self, features_NPC: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(features_NPC.shape[1])
        assert side * side == features_NPC.shape[1], "LDP needs a square grid of patches"
        tokens_NPD = self.mlp(features_NPC)
        grid_NDGG = self.mb_block(tokens_NPD.transpose(1, 2).unflatten(2, (side, side)))
        return grid_NDGG.flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class LdpV1Projector(nn.Module):
    """Project tower features to vision tokens: ``[N, P, C] -> [N, V, D]``, V a quarter of P (144 of CLIP-L/14-336's 576)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.model = _Downsample(in_features, out_features)

    def forward(self, features_NPC: torch.Tensor) -> torch.Tensor:
        """Vision tokens of tower features."""
        return self.model(features_NPC)  # type: ignore[no-any-return]


def ldpv1_grid(image_size: int, patch_size: int) -> int:
    """Side of the grid of vision tokens: half of the patches', rounded up."""
    return (image_size // patch_size + 1) // 2

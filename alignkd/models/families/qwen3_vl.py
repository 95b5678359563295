"""Qwen3-VL: Qwen2.5-VL's way with images, and features of the tower's middle layers, added in the first decoder layers.

Those features (deepstack) have projectors of their own, which are trained with the one that makes the vision tokens.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from alignkd.models.families.qwen2_5_vl import Qwen25Vl


@dataclass
class Qwen3Vl(Qwen25Vl):
    """``Qwen3VLForConditionalGeneration``."""

    family: ClassVar[str] = "qwen3_vl"

    @property
    def projector(self) -> nn.Module:
        """The merger, and one for each layer that features are taken of."""
        visual = self.model.model.visual
        return nn.ModuleList([visual.merger, *visual.deepstack_merger_list])

    def zero_projector_loss(self) -> torch.Tensor:
        """Of a grey image, with all of its features."""
        vision = self._encode_grey_image()
        features = [feature for layer in vision.encoder_outputs.deepstack_features for feature in layer]
        return sum((feature.float().sum() * 0.0 for feature in features), vision.tokens_MD.float().sum() * 0.0)

"""Qwen3-VL: images as in Qwen2.5-VL, and features of the tower's middle layers, added in the first decoder layers.

Each of these features (deepstack) has its own projector, which is trained with the one that makes the vision tokens.
"""

from dataclasses import dataclass

import torch
from torch import nn

from alignkd.models.families.qwen2_5_vl import Qwen25Vl


@dataclass
class Qwen3Vl(Qwen25Vl):
    """``Qwen3VLForConditionalGeneration``."""

    @property
    def projector(self) -> nn.Module:
        """The merger, and the projector of each layer that gives features."""
        visual = self.model.model.visual
        return nn.ModuleList([visual.merger, *visual.deepstack_merger_list])

    def zero_projector_loss(self) -> torch.Tensor:
        """Computed from a grey image, with all of its features."""
        vision = self._encode_grey_image()
        features = [feature for layer in vision.encoder_outputs.deepstack_features for feature in layer]
        return sum((feature.float().sum() * 0.0 for feature in features), vision.tokens_MD.float().sum() * 0.0)

"""LLaVA 1.5: a CLIP tower, two linear layers, one square grid of vision tokens an image.

Some LLaVA checkpoints have another tower: SigLIP, or Pixtral's, whose grid has the image's shape.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.inputs.regions import SquareMode, region, region_without_coordinates, square_box
from alignkd.models.transformers_vlm import TransformersVlm


@dataclass
class Llava(TransformersVlm):
    """``LlavaForConditionalGeneration``."""

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """A square over the image, or over its middle where the processor crops; a class token before it has no coordinates."""
        if "image_sizes" in outputs:
            rows, columns = (int(n) // processor.patch_size for n in outputs["image_sizes"][index])
            return [region(index, (rows, columns))]
        side = math.isqrt(tokens)
        others = tokens - side**2
        if others > 1:
            return [region_without_coordinates(index, tokens)]
        square_mode: SquareMode = "crop" if getattr(processor.image_processor, "do_center_crop", False) else "stretch"
        return [*[region_without_coordinates(index, 1)] * others, region(index, (side, side), square_box(size, square_mode))]

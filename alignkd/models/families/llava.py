"""LLaVA 1.5: a CLIP tower, two linear layers, one square grid of vision tokens an image."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alignkd.models.transformers_vlm import TransformersVlm
from alignkd.regions import Fit, region, square_box


@dataclass
class Llava(TransformersVlm):
    """``LlavaForConditionalGeneration``."""

    family: ClassVar[str] = "llava"

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """A square over the image, or over its middle where the processor crops."""
        del outputs
        side = math.isqrt(tokens)
        fit: Fit = "crop" if getattr(processor.image_processor, "do_center_crop", False) else "stretch"
        return [region(index, (side, side), square_box(size, fit))]

"""Gemma 3: a fixed number of vision tokens an image, which see each other both ways.

Its processor takes no crops of long images (pan and scan) unless each call asks for them, which nothing here does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alignkd.inputs.regions import region
from alignkd.models.transformers_vlm import TransformersVlm


@dataclass
class Gemma3(TransformersVlm):
    """``Gemma3ForConditionalGeneration``."""

    family: ClassVar[str] = "gemma3"

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """The whole image, stretched to a square."""
        del processor, outputs, size
        side = math.isqrt(tokens)
        return [region(index, (side, side))]

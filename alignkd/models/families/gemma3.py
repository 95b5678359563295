"""Gemma 3: a fixed number of vision tokens an image, with attention in both directions among them.

Its processor crops long images (pan and scan) only where a call asks for it; none here does.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.inputs.regions import region
from alignkd.models.transformers_vlm import TransformersVlm


@dataclass
class Gemma3(TransformersVlm):
    """``Gemma3ForConditionalGeneration``."""

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """The whole image, stretched to a square."""
        del processor, outputs, size
        side = math.isqrt(tokens)
        return [region(index, (side, side))]

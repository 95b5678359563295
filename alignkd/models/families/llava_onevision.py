"""LLaVA-OneVision: tiles as in LLaVA-NeXT where a sample has one image, their grid shrunk where it is too large."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.inputs.regions import square_box
from alignkd.models.families.anyres import anyres_regions, single_regions
from alignkd.models.transformers_vlm import TransformersVlm


@dataclass
class LlavaOnevision(TransformersVlm):
    """``LlavaOnevisionForConditionalGeneration``."""

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """Several images are padded to squares; a single image has tiles."""
        side = math.isqrt(processor.num_image_tokens)
        if tokens == side**2 + 1:
            return single_regions(index, side, square_box(size, "pad"))
        tile = np.shape(outputs["pixel_values"][0][0])[-2:]
        canvases = processor.image_processor.image_grid_pinpoints
        most = int(processor.vision_aspect_ratio.removeprefix("anyres_max_"))
        return anyres_regions(index, size, side, (tile[0], tile[1]), canvases, most_tiles=most)

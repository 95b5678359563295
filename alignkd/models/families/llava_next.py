"""LLaVA-NeXT (LLaVA 1.6): the whole image, then tiles of it in a grid whose rows end with a separator."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignkd.models.families.anyres import anyres_regions
from alignkd.models.transformers_vlm import TransformersVlm


@dataclass
class LlavaNext(TransformersVlm):
    """``LlavaNextForConditionalGeneration``."""

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """The image stretched to one tile, then the tiles' grid."""
        del tokens
        height, width = np.shape(outputs["pixel_values"][0][0])[-2:]
        canvases = processor.image_processor.image_grid_pinpoints
        return anyres_regions(index, size, height // processor.patch_size, (height, width), canvases)

"""InternVL 2.5 and 3: the image stretched over a grid of tiles, then the whole image once more."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from alignkd.inputs.regions import region
from alignkd.models.transformers_vlm import TransformersVlm


@dataclass
class InternVl(TransformersVlm):
    """``InternVLForConditionalGeneration``."""

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """Tiles row by row, each a square of tokens; one tile is the whole image."""
        side, tiles = math.isqrt(processor.image_seq_length), tokens // processor.image_seq_length
        whole = region(index, (side, side))
        if tiles == 1:
            return [whole]
        images, (height, width) = processor.image_processor, np.shape(outputs["pixel_values"][0])[-2:]
        columns, rows = get_optimal_tiled_canvas(size[::-1], (height, width), images.min_patches, images.max_patches)
        boxes = [
            (row / rows, column / columns, (row + 1) / rows, (column + 1) / columns)
            for row in range(rows)
            for column in range(columns)
        ]
        return [*(region(index, (side, side), box) for box in boxes), whole]

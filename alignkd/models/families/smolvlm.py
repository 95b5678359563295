"""SmolVLM and Idefics3: an image is cut into tiles, row by row, and the whole image follows."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alignkd.inputs.regions import region
from alignkd.models.transformers_vlm import TransformersVlm

_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")


@dataclass
class SmolVlm(TransformersVlm):
    """``SmolVLMForConditionalGeneration`` and ``Idefics3ForConditionalGeneration``."""

    tower_path: ClassVar[str] = "model.vision_model"
    projector_path: ClassVar[str] = "model.connector"

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """Its tiles, then the whole image; both are stretched to whole tiles. Their number is in the text beside them."""
        del size
        written = outputs["text_replacement_offsets"][0][index]["replacement"]
        tiles = [(int(row), int(column)) for row, column in _TILE.findall(written)]
        rows, columns = tiles[-1] if tiles else (1, 1)
        side = math.isqrt(tokens // (len(tiles) + 1))
        boxes = [((row - 1) / rows, (column - 1) / columns, row / rows, column / columns) for row, column in tiles]
        return [region(index, (side, side), box) for box in [*boxes, (0.0, 0.0, 1.0, 1.0)]]

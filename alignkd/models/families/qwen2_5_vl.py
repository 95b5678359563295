"""Qwen2.5-VL: a tower for any resolution, whose merger gives one vision token for 2 x 2 patches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from alignkd.inputs.regions import region
from alignkd.models.transformers_vlm import TransformersVlm


@dataclass
class Qwen25Vl(TransformersVlm):
    """``Qwen2_5_VLForConditionalGeneration``."""

    tower_path: ClassVar[str] = "model.visual"
    projector_path: ClassVar[str] = "model.visual.merger"

    @staticmethod
    def regions(processor: Any, outputs: Mapping[str, Any], index: int, size: tuple[int, int], tokens: int) -> list[np.ndarray]:
        """The whole image, stretched to a multiple of the patch."""
        del size, tokens
        merge = processor.image_processor.merge_size
        _, rows, columns = (int(n) for n in outputs["image_grid_thw"][index])
        return [region(index, (rows // merge, columns // merge))]

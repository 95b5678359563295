"""``preprocessor_config.json``: how images become pixel values, for the families that preprocess without a processor."""

import json
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError
from alignkd.models.config_files import read_json
from alignkd.models.encoders.images import ImagePreprocessor

NAME = "preprocessor_config.json"


def clip_settings(image_size: int) -> dict[str, Any]:
    """CLIP's own settings: the shortest edge resized, the middle cropped, mean and deviation of each channel."""
    return {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings in a folder.

    Raises:
        CheckpointError: the file is missing, or holds something else.
    """
    if not (folder / NAME).is_file():
        raise CheckpointError(f"{folder} holds no {NAME}; save it again with alignkd, or copy it there")
    return read_json(folder / NAME)


def write_settings(images: ImagePreprocessor, folder: Path) -> None:
    """Write the settings in the form of transformers."""
    settings = {"image_processor_type": "CLIPImageProcessor", **images.settings}
    (folder / NAME).write_text(json.dumps(settings, indent=2))

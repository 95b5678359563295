"""Find the CLIP tower of a checkpoint: its configuration, its preprocessing and, where the checkpoint lacks them, its weights.

The official MobileVLM V2 folders name ``openai/clip-vit-large-patch14-336`` and hold the tower's weights, but neither its
configuration nor its preprocessing; both are built in here, so that no network is needed.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

CLIP_L_336 = "openai/clip-vit-large-patch14-336"

_CLIP_L_336_CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def find_tower(name: str, checkpoint: Path, override: Path | None) -> Path | None:
    """The local folder of the tower called ``name`` in a checkpoint's configuration, or None.

    Looked for at ``override``, then at ``name`` itself (absolute, or relative to the checkpoint), then as a folder of the
    same last name inside or beside the checkpoint.

    Raises:
        ValueError: ``override`` is given and is no CLIP folder.
    """
    if override is not None:
        if not (override / "config.json").is_file():
            raise ValueError(f"--vision-tower {override}: no config.json there; give a local folder of a CLIP model")
        return override
    last = Path(name).name
    candidates = [checkpoint / name, Path(name), checkpoint / last, checkpoint.parent / last]
    return next((c for c in candidates if c != checkpoint and (c / "config.json").is_file()), None)


def tower_config(name: str, folder: Path | None) -> CLIPVisionConfig:
    """The tower's configuration: from its folder, or built in for CLIP-L/14-336.

    Raises:
        ValueError: neither is there.
    """
    if folder is not None:
        config = json.loads((folder / "config.json").read_text())
        return CLIPVisionConfig(**config.get("vision_config") or config)
    if name == CLIP_L_336:
        return CLIPVisionConfig(**_CLIP_L_336_CONFIG)
    raise ValueError(
        f"vision tower {name!r} is not a local folder (looked inside and beside the checkpoint) and only {CLIP_L_336!r} is"
        " built in; give its folder with --vision-tower"
    )


def image_settings(checkpoint: Path, folder: Path | None, image_size: int) -> dict[str, Any]:
    """CLIP preprocessing settings: the checkpoint's own file, the tower's, or CLIP's own at the tower's image size."""
    for place in (checkpoint, folder):
        if place is not None and (place / "preprocessor_config.json").is_file():
            settings: dict[str, Any] = json.loads((place / "preprocessor_config.json").read_text())
            return settings
    return {
        "size": {"shortest_edge": image_size},
        "crop_size": {"height": image_size, "width": image_size},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }

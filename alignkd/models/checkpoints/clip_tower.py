"""Find the CLIP tower of a checkpoint: its configuration, its preprocessing and, where the checkpoint lacks them, its weights.

The official MobileVLM folders name ``openai/clip-vit-large-patch14-336`` and hold the tower's weights, but neither its
configuration nor its preprocessing. Both are built in here, so that no network is needed.
"""

from pathlib import Path
from typing import Any

from transformers import CLIPVisionConfig

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.models.checkpoints.preprocessor_files import NAME, clip_settings
from alignkd.models.config_files import check_sizes, mapping, read_json

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

    Searched at ``override``, then at ``name`` itself (absolute, or relative to the checkpoint), then as a folder of the
    same last name inside or beside the checkpoint.

    Raises:
        CheckpointError: ``override`` is given and is no CLIP folder.
    """
    if override is not None:
        if not (override / "config.json").is_file():
            raise CheckpointError(f"--vision-tower {override}: no config.json there; give a local folder of a CLIP model")
        return override
    last = Path(name).name
    candidates = [checkpoint / name, Path(name), checkpoint / last, checkpoint.parent / last]
    return next((c for c in candidates if c != checkpoint and (c / "config.json").is_file()), None)


def tower_config(name: str, folder: Path | None) -> CLIPVisionConfig:
    """The tower's configuration: from its folder, or built in for CLIP-L/14-336.

    Raises:
        CheckpointError: neither is there, or the folder's is not CLIP's.
    """
    if folder is not None:
        path = folder / "config.json"
        config = read_json(path)
        check_sizes(config, path)
        if config.get("vision_config") is not None:
            config = mapping(config, "vision_config", path) or config
        with wrap_errors(CheckpointError, f"{path} is not the configuration of a CLIP vision tower"):
            return CLIPVisionConfig(**config)
    if name == CLIP_L_336:
        return CLIPVisionConfig(**_CLIP_L_336_CONFIG)
    raise CheckpointError(
        f"vision tower {name!r} is not a local folder (searched inside and beside the checkpoint) and only {CLIP_L_336!r} is"
        " built in; give its folder with --vision-tower"
    )


def image_settings(checkpoint: Path, folder: Path | None, image_size: int) -> dict[str, Any]:
    """CLIP preprocessing settings: the checkpoint's own file, the tower's, or CLIP's own at the tower's image size."""
    for source in (checkpoint, folder):
        if source is not None and (source / NAME).is_file():
            return read_json(source / NAME)
    return clip_settings(image_size)

"""The folder layout of the official ``mtgv/MobileVLM-*`` and ``MobileVLM_V2-*`` checkpoints, without their repository."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, LlamaConfig

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.models.checkpoints.build import build_model
from alignkd.models.checkpoints.clip_tower import find_tower, image_settings, tower_config
from alignkd.models.checkpoints.preprocessor_files import read_settings
from alignkd.models.checkpoints.state_files import read_state
from alignkd.models.config_files import integer, short
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.modules.ldpv1 import ldpv1_grid
from alignkd.models.modules.mobilevlm import PROJECTORS, MobileVlm, MobileVlmConfig

TO_OURS = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.", "model.multi_modal_projector."),
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model."),
)
_TO_OFFICIAL = (
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "model.mm_projector."),
    (r"^model\.language_model\.", "model."),
)
_ALWAYS_WRITTEN = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def rename(state: dict[str, torch.Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    """The same tensors, each under the name that the first rule which matches gives it."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in rules:
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        renamed[name] = tensor
    return renamed


def read_official(
    folder: Path, official: dict[str, Any], dtype: torch.dtype, vision_tower: Path | None
) -> tuple[MobileVlm, ImagePreprocessor]:
    """Build the model and its preprocessing from an official folder.

    Raises:
        CheckpointError: an unknown projector or tower, or weights that do not match the configuration.
    """
    config, tower_name, tower_folder = official_config(folder, official, vision_tower)
    state = {k: v for k, v in rename(read_state(folder), TO_OURS).items() if not BUFFERS.search(k)}
    if not any(name.startswith("model.vision_tower.") for name in state):
        state.update(tower_state(folder, tower_name, tower_folder))
    tie_embeddings(config, state)
    model = build_model(folder, config, state, dtype, MobileVlm)
    settings = image_settings(folder, tower_folder, int(config.vision_config.image_size))
    return model, ImagePreprocessor(settings, config.image_aspect_ratio)


def official_config(
    folder: Path, official: dict[str, Any], vision_tower: Path | None
) -> tuple[MobileVlmConfig, str, Path | None]:
    """The configuration of an official folder, the name of its tower, and the tower's folder.

    Raises:
        CheckpointError: an unknown projector or tower.
    """
    where = folder / "config.json"
    projector = official.get("mm_projector_type")
    if projector not in PROJECTORS:
        raise CheckpointError(
            f"{where}: mm_projector_type is {short(projector)}; known are 'ldpnet' (MobileVLM) and 'ldpnetv2' (MobileVLM V2)"
        )
    if official.get("mm_use_im_start_end"):
        raise CheckpointError(
            f"{where}: mm_use_im_start_end is true, so it was trained with <im_start> and <im_end> around each image, which is"
            " not supported: use a checkpoint that was trained without them, as the released ones are"
        )
    tower_name = official.get("mm_vision_tower") or official.get("vision_tower")
    if not isinstance(tower_name, str):
        raise CheckpointError(f"{where} names no mm_vision_tower; is this a text-only checkpoint?")
    tower_folder = find_tower(tower_name, folder, vision_tower)
    return _to_config(where, official, projector, tower_config(tower_name, tower_folder)), tower_name, tower_folder


def describe(folder: Path, official: dict[str, Any] | None, vision_tower: Path | None) -> tuple[MobileVlm, ImagePreprocessor]:
    """The model without weights, and its preprocessing; ``official``: the configuration of an official folder, else None.

    Raises:
        CheckpointError: as :func:`read_official` and :func:`read_own`.
    """
    if official is None:
        config, settings = own_config(folder), read_settings(folder)
    else:
        config, _, tower_folder = official_config(folder, official, vision_tower)
        settings = image_settings(folder, tower_folder, int(config.vision_config.image_size))
    with wrap_errors(CheckpointError, f"{folder}: no model can be made of its configuration"), torch.device("meta"):
        model = MobileVlm(config)
    return model, ImagePreprocessor(settings, config.image_aspect_ratio)


def own_config(folder: Path) -> MobileVlmConfig:
    """The configuration of a folder that alignkd saved.

    Raises:
        CheckpointError: it is no MobileVLM's.
    """
    with wrap_errors(CheckpointError, f"{folder}/config.json is not the configuration of a MobileVLM"):
        config: MobileVlmConfig = MobileVlmConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_feature_layer(folder / "config.json", config)
    return config


def read_own(folder: Path, dtype: torch.dtype) -> tuple[MobileVlm, ImagePreprocessor]:
    """Build the model and its preprocessing from a folder that alignkd saved.

    Raises:
        CheckpointError: a file is missing, or the weights do not match the configuration.
    """
    config = own_config(folder)
    state = read_state(folder)
    tie_embeddings(config, state)
    settings = read_settings(folder)
    model = build_model(folder, config, state, dtype, MobileVlm)
    return model, ImagePreprocessor(settings, config.image_aspect_ratio)


def tie_embeddings(config: MobileVlmConfig, state: dict[str, torch.Tensor]) -> None:
    """Tied weights are saved once: give the output head its name, too."""
    embeddings = state.get("model.language_model.embed_tokens.weight")
    if config.tie_word_embeddings and embeddings is not None:
        state.setdefault("lm_head.weight", embeddings)


_NOT_TEXT = ("mm_", "_name_or_path", "model_type", "architectures", "transformers_version", "image_", "vision_", "use_mm")
"""How keys of the official configuration begin that are not the language model's."""


def _to_config(where: Path, official: dict[str, Any], projector: str, vision: CLIPVisionConfig) -> MobileVlmConfig:
    feature = official.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise CheckpointError(f"{where}: mm_vision_select_feature is {short(feature)}; LDP needs 'patch', a square")
    text = {k: v for k, v in official.items() if not k.startswith(_NOT_TEXT) and k not in ("torch_dtype", "dtype")}
    layer = integer(official, "mm_vision_select_layer", where, -2, -1024, 1024)
    grid = integer(official, "mm_projector_grid", where, 12, 1, 256)
    with wrap_errors(CheckpointError, f"{where} is not the configuration of a MobileVLM"):
        config = MobileVlmConfig(
            vision_config=vision.to_dict(),
            text_config=LlamaConfig(**text).to_dict(),
            vision_feature_layer=layer,
            vision_feature_select_strategy="default",
            projector_type=projector,
            projector_grid=ldpv1_grid(vision.image_size, vision.patch_size) if projector == "ldpnet" else grid,
            image_aspect_ratio=official.get("image_aspect_ratio") or "square",
            tie_word_embeddings=bool(official.get("tie_word_embeddings", False)),
        )
    _check_feature_layer(where, config)
    return config


def _check_feature_layer(where: Path, config: MobileVlmConfig) -> None:
    """Refuse a layer that the tower does not have."""
    states = int(config.vision_config.num_hidden_layers) + 1
    if not -states <= config.vision_feature_layer < states:
        raise CheckpointError(
            f"{where}: the features are those of layer {config.vision_feature_layer}, but the vision tower has"
            f" {states - 1} layers"
        )


def tower_state(folder: Path, name: str, tower_folder: Path | None) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint's CLIP tower, from the tower's own folder, under our names.

    Raises:
        CheckpointError: there is no such folder, or its weights cannot be read.
    """
    if tower_folder is None:
        raise CheckpointError(
            f"{folder} holds no tower weights and {name!r} is not a local folder; give it with --vision-tower"
        )
    state = read_state(tower_folder)
    towers = {re.sub(r"^vision_model\.", "", k): v for k, v in state.items() if k.startswith("vision_model.")}
    return {f"model.vision_tower.{k}": v for k, v in (towers or state).items() if not BUFFERS.search(k)}


def write_official(model: MobileVlm, folder: Path, *, original: dict[str, Any] | None = None) -> None:
    """Write config.json and weights in the official layout (safetensors), with the tower's configuration in ``clip/``.

    ``original`` is the configuration the model was read from; its unknown keys are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(rename(state, _TO_OFFICIAL), folder / "model.safetensors", metadata={"format": "pt"})
    text = model.config.text_config.to_diff_dict()
    official = {
        **(original or {}),
        **{k: v for k, v in text.items() if k not in ("model_type", "rope_parameters", "architectures")},
        **{k: getattr(model.config.text_config, k) for k in _ALWAYS_WRITTEN},
        "rope_theta": model.config.text_config.rope_parameters["rope_theta"],
        "model_type": "mobilevlm",
        "architectures": ["MobileLlamaForCausalLM"],
        "mm_projector_type": model.config.projector_type,
        "mm_projector_grid": model.config.projector_grid,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_vision_tower": "./clip",
        "mm_vision_select_layer": model.config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": model.config.image_aspect_ratio,
        "vision_tower_type": "clip",
        "use_mm_proj": True,
        "tie_word_embeddings": bool(model.config.tie_word_embeddings),
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    rope = dict(model.config.text_config.rope_parameters)
    rope.pop("rope_theta")
    scaled = rope.get("rope_type", "default") != "default"
    official["rope_scaling"] = {**rope, "type": rope["rope_type"]} if scaled else None
    (folder / "config.json").write_text(json.dumps(official, indent=2, sort_keys=True))
    (folder / "clip").mkdir(exist_ok=True)
    (folder / "clip" / "config.json").write_text(model.config.vision_config.to_json_string())

"""The folder layout of the official ``mtgv/MobileVLM-*`` and ``MobileVLM_V2-*`` checkpoints, without their repository."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from alignkd.models.checkpoints.clip_tower import find_tower, image_settings, tower_config
from alignkd.models.checkpoints.state_files import read_state
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.modules.ldpv1 import ldpv1_grid
from alignkd.models.modules.mobilevlm import PROJECTORS, MobileVlm, MobileVlmConfig

_TO_OURS = (
    (r"^model\.vision_tower\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^model\.mm_projector\.", "model.multi_modal_projector."),
    (r"^model\.(?=embed_tokens\.|layers\.|norm\.)", "model.language_model."),
)
_TO_OFFICIAL = (
    (r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.multi_modal_projector\.", "model.mm_projector."),
    (r"^model\.language_model\.", "model."),
)
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def _rename(state: dict[str, torch.Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
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
        ValueError: an unknown projector or tower, or weights that do not fit the configuration.
    """
    projector = official.get("mm_projector_type")
    if projector not in PROJECTORS:
        raise ValueError(
            f"{folder}/config.json: mm_projector_type is {projector!r}; known are 'ldpnet' (MobileVLM) and 'ldpnetv2'"
            " (MobileVLM V2)"
        )
    tower_name = official.get("mm_vision_tower") or official.get("vision_tower")
    if not tower_name:
        raise ValueError(f"{folder}/config.json names no mm_vision_tower; is this a text-only checkpoint?")
    tower_folder = find_tower(str(tower_name), folder, vision_tower)
    config = _to_config(folder, official, tower_config(str(tower_name), tower_folder))
    state = {k: v for k, v in _rename(read_state(folder), _TO_OURS).items() if not _BUFFERS.search(k)}
    if not any(name.startswith("model.vision_tower.") for name in state):
        state.update(_tower_state(folder, str(tower_name), tower_folder))
    if config.text_config.tie_word_embeddings:
        embeddings = state.get("model.language_model.embed_tokens.weight")
        if embeddings is not None:
            state.setdefault("lm_head.weight", embeddings)
    model = build_model(folder, config, state, dtype)
    settings = image_settings(folder, tower_folder, int(config.vision_config.image_size))
    return model, ImagePreprocessor(settings, config.image_aspect_ratio)


def _to_config(folder: Path, official: dict[str, Any], vision: Any) -> MobileVlmConfig:
    dropped = (
        "mm_",
        "_name_or_path",
        "model_type",
        "architectures",
        "transformers_version",
        "image_",
        "vision_",
        "use_mm",
    )
    text = {k: v for k, v in official.items() if not k.startswith(dropped) and k not in ("torch_dtype", "dtype")}
    feature = official.get("mm_vision_select_feature", "patch")
    if feature != "patch":
        raise ValueError(f"{folder}/config.json: mm_vision_select_feature is {feature!r}; LDP needs 'patch', a square")
    projector = str(official["mm_projector_type"])
    halved = ldpv1_grid(vision.image_size, vision.patch_size)
    return MobileVlmConfig(
        vision_config=vision.to_dict(),
        text_config=LlamaConfig(**text).to_dict(),
        vision_feature_layer=int(official.get("mm_vision_select_layer", -2)),
        vision_feature_select_strategy="default",
        projector_type=projector,
        projector_grid=halved if projector == "ldpnet" else int(official.get("mm_projector_grid", 12)),
        image_aspect_ratio=official.get("image_aspect_ratio") or "square",
        tie_word_embeddings=bool(official.get("tie_word_embeddings", False)),
    )


def _tower_state(folder: Path, name: str, tower_folder: Path | None) -> dict[str, torch.Tensor]:
    if tower_folder is None:
        raise ValueError(f"{folder} holds no tower weights and {name!r} is not a local folder; give it with --vision-tower")
    state = read_state(tower_folder)
    towers = {re.sub(r"^vision_model\.", "", k): v for k, v in state.items() if k.startswith("vision_model.")}
    return {f"model.vision_tower.{k}": v for k, v in (towers or state).items() if not _BUFFERS.search(k)}


def build_model(
    folder: Path, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, kind: type[Any] = MobileVlm
) -> Any:
    """A model of a kind with exactly these weights.

    Raises:
        ValueError: a tensor is missing, is not the model's, or has another shape.
    """
    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in kind(config).state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    for what, names in (("lack", missing), ("also hold", unexpected), ("do not fit the configuration:", misshapen)):
        if names:
            raise ValueError(f"{folder}: the weights {what} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
    return kind.from_pretrained(None, config=config, state_dict=state, dtype=dtype)


def write_official(
    model: MobileVlm,
    folder: Path,
    *,
    tower_name: str,
    original: dict[str, Any] | None = None,
    shard_name: str = "model",
) -> None:
    """Write config.json and weights in the official layout (safetensors), with the tower's configuration in ``clip/``.

    ``original`` is the configuration the model was read from; its unknown keys are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(_rename(state, _TO_OFFICIAL), folder / f"{shard_name}.safetensors", metadata={"format": "pt"})
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
        "mm_vision_tower": tower_name,
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


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files as they are: a converted tokenizer is another tokenizer."""
    for name in (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)

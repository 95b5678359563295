"""MobileVLM V1 in the official layout: LDP from 8 x 8 patches to 4 x 4 vision tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_parts import tower_settings
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from alignkd.inputs.batch import expand
from alignkd.inputs.prompts import encode_conversation, encode_question
from alignkd.models.loading import load_vlm, save_vlm

TOKENIZER = Path(__file__).parents[1] / "data" / "mobilevlm_v2_tiny" / "student"
PIXELS = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "resample": 3}


def copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)


def projector_state(tower: int, width: int) -> dict[str, torch.Tensor]:
    """Random weights of LDP under the official names."""
    state: dict[str, torch.Tensor] = {}

    def linear(name: str, inside: int, outside: int, *, kernel: tuple[int, ...] = ()) -> None:
        state[f"{name}.weight"] = torch.randn(outside, inside, *kernel) * 1.5 / inside**0.5
        state[f"{name}.bias"] = torch.randn(outside) * 0.3

    def norm(name: str) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.2 * torch.randn(width), 0.3 * torch.randn(width)

    linear("mlp.1", tower, width)
    linear("mlp.3", width, width)
    for number in (1, 2):
        block = f"mb_block.{number}.block"
        state[f"{block}.0.0.weight"] = torch.randn(width, 1, 3, 3) * 0.5
        norm(f"{block}.0.1")
        linear(f"{block}.1.fc1", width, 8, kernel=(1, 1))
        linear(f"{block}.1.fc2", 8, width, kernel=(1, 1))
        state[f"{block}.2.0.weight"] = torch.randn(width, width, 1, 1) * 1.5 / width**0.5
        norm(f"{block}.2.1")
    return {f"model.mm_projector.model.{name}": tensor for name, tensor in state.items()}


def write_official(folder: Path, seed: int = 0, *, projector: str = "ldpnet", **changes: Any) -> dict[str, torch.Tensor]:
    """A folder as released, its tower's configuration beside; returns the weights under the official names."""
    torch.manual_seed(seed)
    tower = CLIPVisionConfig(**tower_settings(**{"image_size": 64, **changes}))
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    state = {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in CLIPVisionModel(tower).state_dict().items()}
    state |= _spread(LlamaForCausalLM(text)).state_dict() | projector_state(tower.hidden_size, text.hidden_size)
    folder.mkdir(parents=True)
    torch.save(state, folder / "pytorch_model.bin")
    official = {
        **{k: v for k, v in text.to_dict().items() if k not in ("rope_parameters", "dtype")},
        "rope_theta": 10000.0,
        "model_type": "mobilevlm",
        "architectures": ["MobileLlamaForCausalLM"],
        "mm_projector_type": projector,
        "mm_vision_tower": "./clip",
        "mm_hidden_size": tower.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "vision_tower_type": "clip",
        "image_aspect_ratio": "pad",
    }
    (folder / "config.json").write_text(json.dumps(official))
    (folder / "clip").mkdir()
    (folder / "clip" / "config.json").write_text(tower.to_json_string())
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(PIXELS))
    copy_tokenizer(folder)
    return state


def _spread(model: nn.Module) -> nn.Module:
    """Larger weights than at the start of a training, so that no part of a sum is lost in rounding."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def write(folder: Path, seed: int = 0) -> None:
    """As alignkd saves it, which transformers' own loader opens."""
    write_official(folder / "official", seed)
    save_vlm(load_vlm(folder / "official"), folder)
    shutil.rmtree(folder / "official")


def plain(folder: Path, turns: Sequence[tuple[str, str]], images: Sequence[Image.Image], opened: bool) -> dict[str, Any]:
    """Ids as the golden tests hold them, one for each vision token."""
    vlm: Any = load_vlm(folder)
    about: dict[str, Any] = {"template": "v1", "tokenizer": vlm.tokenizer, "has_image": bool(images)}
    if opened:
        ids = encode_question([*turns, ("gpt", "")], **about)
    else:
        ids = encode_conversation(turns, **about, max_length=2048).input_ids
    given = {"input_ids": torch.from_numpy(expand(ids, ids, 16).input_ids)[None]}
    return given | ({"pixel_values": torch.stack([vlm.images(image) for image in images])} if images else {})

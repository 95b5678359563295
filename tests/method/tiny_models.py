"""Tiny checkpoints in the official layout, and a slow restatement of the model in plain torch to compare with.

The restatement follows the published descriptions (CLIP's vision transformer, LDPv2, Llama); it shares no code with the
package or with transformers, takes one sample at a time and keeps every intermediate value.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from alignkd.inputs.batch import Batch, ModelInput, collate
from alignkd.inputs.prompts import IGNORE
from alignkd.models.vlm import Vlm

GOLDEN = Path(__file__).parents[1] / "data" / "mobilevlm_v2_tiny"
IMAGE = -200
VOCABULARY = 512

TOWER = {
    "architectures": ["CLIPVisionModel"],
    "model_type": "clip_vision_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 16,
    "image_size": 16,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-5,
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 4,
    "projection_dim": 8,
}

PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 16},
    "crop_size": {"height": 16, "width": 16},
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
}

MODEL = {
    "architectures": ["MobileLlamaForCausalLM"],
    "model_type": "mobilevlm",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 24,
    "image_aspect_ratio": "pad",
    "intermediate_size": 40,
    "max_position_embeddings": 2048,
    "mm_hidden_size": 16,
    "mm_projector_type": "ldpnetv2",
    "mm_projector_grid": 2,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "./clip",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCABULARY,
}

TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."


def random_state(config: dict[str, Any], tower: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the official names."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}

    def add(name: str, *shape: int, scale: float | None = None, around: float = 0.0) -> None:
        scale = 1.5 / math.sqrt(shape[-1]) if scale is None else scale
        state[name] = torch.randn(*shape, generator=generator) * scale + around

    def linear(name: str, inside: int, outside: int) -> None:
        add(f"{name}.weight", outside, inside)
        add(f"{name}.bias", outside, scale=0.1)

    def norm(name: str, width: int) -> None:
        add(f"{name}.weight", width, scale=0.2, around=1.0)
        add(f"{name}.bias", width, scale=0.1)

    width, patches = tower["hidden_size"], (tower["image_size"] // tower["patch_size"]) ** 2
    add(f"{TOWER_PREFIX}embeddings.class_embedding", width, scale=1.0)
    add(f"{TOWER_PREFIX}embeddings.patch_embedding.weight", width, 3, tower["patch_size"], tower["patch_size"], scale=0.2)
    add(f"{TOWER_PREFIX}embeddings.position_embedding.weight", patches + 1, width, scale=0.5)
    norm(f"{TOWER_PREFIX}pre_layrnorm", width)
    norm(f"{TOWER_PREFIX}post_layernorm", width)
    for i in range(tower["num_hidden_layers"]):
        layer = f"{TOWER_PREFIX}encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{name}", width, width)
        norm(f"{layer}layer_norm1", width)
        norm(f"{layer}layer_norm2", width)
        linear(f"{layer}mlp.fc1", width, tower["intermediate_size"])
        linear(f"{layer}mlp.fc2", tower["intermediate_size"], width)

    hidden, head = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    linear("model.mm_projector.mlp.mlp.0", width, hidden)
    linear("model.mm_projector.mlp.mlp.2", hidden, hidden)
    add("model.mm_projector.peg.peg.0.weight", hidden, 1, 3, 3, scale=0.3)
    add("model.mm_projector.peg.peg.0.bias", hidden, scale=0.1)
    add("model.embed_tokens.weight", config["vocab_size"], hidden, scale=1.0)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            add(f"{layer}self_attn.{name}_proj.weight", config[heads] * head, hidden)
        add(f"{layer}self_attn.o_proj.weight", hidden, hidden)
        add(f"{layer}mlp.gate_proj.weight", config["intermediate_size"], hidden)
        add(f"{layer}mlp.up_proj.weight", config["intermediate_size"], hidden)
        add(f"{layer}mlp.down_proj.weight", hidden, config["intermediate_size"])
        add(f"{layer}input_layernorm.weight", hidden, scale=0.2, around=1.0)
        add(f"{layer}post_attention_layernorm.weight", hidden, scale=0.2, around=1.0)
    add("model.norm.weight", hidden, scale=0.2, around=1.0)
    if not config["tie_word_embeddings"]:
        add("lm_head.weight", config["vocab_size"], hidden)
    return state


def copy_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(GOLDEN / "student" / name, folder / name)


def write_checkpoint(
    folder: Path, *, seed: int = 0, tower: dict[str, Any] | None = None, **changes: Any
) -> dict[str, torch.Tensor]:
    """An official folder of random weights, its tower's configuration and preprocessing in ``clip/``; returns the weights."""
    config, tower = {**MODEL, **changes}, {**TOWER, **(tower or {})}
    config["mm_hidden_size"] = tower["hidden_size"]
    state = random_state(config, tower, seed)
    (folder / "clip").mkdir(parents=True)
    (folder / "clip" / "config.json").write_text(json.dumps(tower))
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(_preprocessor(tower["image_size"])))
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "pytorch_model.bin")
    copy_tokenizer(folder)
    return state


def _preprocessor(side: int) -> dict[str, Any]:
    return {**PREPROCESSOR, "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def change_config(folder: Path, **changes: Any) -> None:
    """Edit ``config.json`` in place; a value of ``...`` removes the key."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


# --- the restatement ---------------------------------------------------------------------------------------------------


@dataclass
class Reference:
    """Values of one sample: layer-0 attention ``[H, S, S]``, vision tokens ``[n, V, D]``, logits ``[S, N]``."""

    attention: torch.Tensor
    vision: torch.Tensor
    logits: torch.Tensor


def reference_vision(
    state: dict[str, torch.Tensor], config: dict[str, Any], tower: dict[str, Any], pixels: torch.Tensor
) -> Any:
    """Vision tokens ``[n, V, D]`` of pixel values ``[n, 3, h, w]``."""
    width, heads = tower["hidden_size"], tower["num_attention_heads"]
    weights = {k.removeprefix(TOWER_PREFIX): v for k, v in state.items() if k.startswith(TOWER_PREFIX)}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], tower["layer_norm_eps"])

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patches = functional.conv2d(pixels, weights["embeddings.patch_embedding.weight"], stride=tower["patch_size"])
    patches = patches.flatten(2).transpose(1, 2)
    first = weights["embeddings.class_embedding"].expand(len(pixels), 1, -1)
    x = norm(torch.cat([first, patches], dim=1) + weights["embeddings.position_embedding.weight"], "pre_layrnorm")
    states = [x]
    for i in range(tower["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        h = norm(x, f"{layer}layer_norm1")
        q, k, v = (linear(h, f"{layer}self_attn.{n}_proj").unflatten(2, (heads, width // heads)).transpose(1, 2) for n in "qkv")
        weight = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(3)
        x = x + linear((weight @ v).transpose(1, 2).flatten(2), f"{layer}self_attn.out_proj")
        h = linear(norm(x, f"{layer}layer_norm2"), f"{layer}mlp.fc1")
        x = x + linear(h * torch.sigmoid(1.702 * h), f"{layer}mlp.fc2")
        states.append(x)
    features = states[config["mm_vision_select_layer"]][:, 1:]

    projector = {k.removeprefix("model.mm_projector."): v for k, v in state.items() if "mm_projector" in k}
    h = functional.gelu(features @ projector["mlp.mlp.0.weight"].T + projector["mlp.mlp.0.bias"])
    h = h @ projector["mlp.mlp.2.weight"].T + projector["mlp.mlp.2.bias"]
    side, hidden = math.isqrt(h.shape[1]), h.shape[2]
    grid = h.transpose(1, 2).reshape(len(pixels), hidden, side, side)
    grid = functional.adaptive_avg_pool2d(grid, config.get("mm_projector_grid", 12))
    position = functional.conv2d(grid, projector["peg.peg.0.weight"], projector["peg.peg.0.bias"], padding=1, groups=hidden)
    return (grid + position).flatten(2).transpose(1, 2)


def reference(
    state: dict[str, torch.Tensor], config: dict[str, Any], tower: dict[str, Any], input_ids: np.ndarray, pixels: torch.Tensor
) -> Reference:
    """The whole model on one sample of compact ids, placeholder by placeholder."""
    vision = reference_vision(state, config, tower, pixels) if len(pixels) else torch.zeros(0, 0, config["hidden_size"])
    rows, image = [], 0
    for i in input_ids.tolist():
        if i == IMAGE:
            rows.extend(vision[image])
            image += 1
        else:
            rows.append(state["model.embed_tokens.weight"][i])
    x = torch.stack(rows)
    length, hidden = x.shape
    heads, groups = config["num_attention_heads"], config["num_attention_heads"] // config["num_key_value_heads"]
    width = hidden // heads
    angles = torch.arange(length)[:, None] * config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
    cosine, sine = torch.cat([angles, angles], dim=1).cos(), torch.cat([angles, angles], dim=1).sin()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(1, keepdim=True) + config["rms_norm_eps"]).rsqrt() * state[f"{name}.weight"]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = width // 2
        return x * cosine + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sine

    first_attention = None
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        h = norm(x, f"{layer}input_layernorm")
        q, k, v = ((h @ state[f"{layer}self_attn.{n}_proj.weight"].T).unflatten(1, (-1, width)).transpose(0, 1) for n in "qkv")
        q, k, v = rotate(q), rotate(k).repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(width)
        weight = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(2)
        first_attention = weight if first_attention is None else first_attention
        x = x + (weight @ v).transpose(0, 1).flatten(1) @ state[f"{layer}self_attn.o_proj.weight"].T
        h = norm(x, f"{layer}post_attention_layernorm")
        gate = functional.silu(h @ state[f"{layer}mlp.gate_proj.weight"].T) * (h @ state[f"{layer}mlp.up_proj.weight"].T)
        x = x + gate @ state[f"{layer}mlp.down_proj.weight"].T
    head = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    return Reference(first_attention, vision, norm(x, "model.norm") @ head.T)


# --- samples -----------------------------------------------------------------------------------------------------------


def sample(vlm: Vlm, text: list[int], *, answers: int = 3, seed: int = 0) -> ModelInput:
    """A prepared sample: compact ids as given, the last ``answers`` of them supervised, and random images."""
    ids = np.asarray(text, dtype=np.int64)
    labels = ids.copy()
    labels[: len(labels) - answers] = IGNORE
    size = vlm.model.config.vision_config.image_size
    images = torch.randn(text.count(IMAGE), 3, size, size, generator=torch.Generator().manual_seed(seed))
    return ModelInput(ids, labels, images)


def mixture(vlm: Vlm) -> list[ModelInput]:
    """Samples of every kind: image first, after text, several images together and apart, none; of many lengths."""
    return [
        sample(vlm, [1, IMAGE, 7, 8, 9, 10], seed=1),
        sample(vlm, [1, 20, 21, 22, IMAGE, 23, 24, 25, 26, 27, 28, 29, 30, 31], answers=5, seed=2),
        sample(vlm, [1, 40, 41, 42, 43, 44, 45, 46, 47], answers=4),
        sample(vlm, [1, IMAGE, IMAGE, 50, 51, 52], answers=2, seed=3),
        sample(vlm, [1, 60, IMAGE, 61, 62, 63, IMAGE, 64, 65, 66, 67], answers=3, seed=4),
        sample(vlm, [1, 70, 71, 72, IMAGE, 73, 74], answers=0, seed=5),
    ]


def batch_of(vlm: Vlm, samples: list[ModelInput]) -> Batch:
    return collate(samples, tokens_per_placeholder=vlm.vision_tokens_per_image, pad_token_id=0)


def eager_attention(vlm: Vlm, one: ModelInput) -> torch.Tensor:
    """Layer-0 attention ``[H, T, V]`` of one sample by ``output_attentions`` and the eager kernel, on the same weights."""
    model = vlm.model
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        batch = batch_of(vlm, [one])
        output = model(input_ids=batch.input_ids_BS, pixel_values=one.images, output_attentions=True, use_cache=False)
        attention = output.attentions[0][0]
    finally:
        model.set_attn_implementation({"text_config": before})
    return attention[:, batch.text_rows_BT[0]][:, :, batch.vision_columns_BV[0]]


def flat(outcome: Any) -> dict[str, torch.Tensor]:
    """What an objective gave: its loss, and each term by name."""
    return {"loss": outcome["loss"], **outcome["terms"]}

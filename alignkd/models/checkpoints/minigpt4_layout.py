"""MiniGPT-4 as it is released: four separate downloads, which a small ``config.json`` brings together.

``{"model_type": "minigpt4", "vicuna": FOLDER, "vision": FILE, "qformer": FILE, "projection": FILE}``, paths relative to the
folder: Vicuna in Hugging Face form, ``eva_vit_g.pth``, ``blip2_pretrained_flant5xxl.pth`` and ``pretrained_minigpt4_7b.pth``.
``vision_config``, ``qformer_config`` and ``num_query_tokens`` are those of the release where they are left out.

1. Each file's tensors get transformers' names; a tensor that does not belong in such a file is refused by name.
2. Later files override earlier ones: a MiniGPT-4 checkpoint may hold its own queries, Q-Former or norm.
3. Together they must be the model's tensors, each of its shape.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2QFormerConfig, Blip2VisionConfig, LlamaConfig

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.models.checkpoints.build import build_model
from alignkd.models.checkpoints.state_files import read_state, read_wrapped
from alignkd.models.config_files import check_sizes, integer, mapping, read_json
from alignkd.models.modules.minigpt4 import MiniGpt4, MiniGpt4Config

_FILES = ("vicuna", "vision", "qformer", "projection")
"""What a configuration names, in the order of reading."""


@dataclass(frozen=True)
class _Kind:
    """How a file's names become transformers', and which of its tensors MiniGPT-4 does not use."""

    rules: tuple[tuple[str, str], ...]
    unused: str = r"(?!)"


_BLIP2 = (
    (r"^ln_vision\.", "vision_model.post_layernorm."),
    (r"^query_tokens$", "query_tokens"),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
    (
        r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(attention|crossattention)\.self\.(query|key|value)\.",
        r"qformer.encoder.layer.\1.\2.attention.\3.",
    ),
    (
        r"^Qformer\.bert\.encoder\.layer\.(\d+)\.(attention\.output|crossattention\.output|intermediate_query|output_query)\.",
        r"qformer.encoder.layer.\1.\2.",
    ),
)
# The half that reads text, BERT's position buffer, and the layer into another language model.
_BLIP2_UNUSED = (
    r"Qformer\.cls\.|Qformer\.bert\.embeddings\.(word_embeddings|position_embeddings|position_ids)"
    r"|Qformer\.bert\.encoder\.layer\.\d+\.(intermediate|output)\.|(t5|opt)_proj\."
)
_KINDS = {
    "vicuna": _Kind(((r"^(?=model\.|lm_head\.)", "language_model."),), unused=r".*rotary_emb\.inv_freq$"),
    "vision": _Kind(
        (
            (r"^cls_token$", "vision_model.embeddings.class_embedding"),
            (r"^pos_embed$", "vision_model.embeddings.position_embedding"),
            (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
            (r"^blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
            (r"^blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
            (r"^blocks\.(\d+)\.attn\.(?=qkv\.|q_bias$|v_bias$)", r"vision_model.encoder.layers.\1.self_attn."),
            (r"^blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
        ),
        unused=r"norm\.|fc_norm\.|head\.|mask_token$",
    ),
    "qformer": _Kind(_BLIP2, _BLIP2_UNUSED),
    "projection": _Kind(((r"^llama_proj\.", "language_projection."), *_BLIP2), _BLIP2_UNUSED),
}


def is_official(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` of MiniGPT-4 names the files of its release, rather than being a saved model's own."""
    return "text_config" not in config


def vicuna_folder(folder: Path, config: dict[str, Any]) -> Path:
    """Where the language model and its tokenizer are.

    Raises:
        CheckpointError: the configuration does not name all that belongs to MiniGPT-4.
    """
    if missing := [name for name in _FILES if not isinstance(config.get(name), str)]:
        raise CheckpointError(
            f"{folder}/config.json: a MiniGPT-4 names {', '.join(_FILES)}; it lacks {', '.join(missing)}. The Llama 2 version"
            " has no Q-Former and is not supported"
        )
    return folder / str(config["vicuna"])


def read_released(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> MiniGpt4:
    """The model, from the files that a configuration names.

    Raises:
        CheckpointError: a file is missing or is another one, or the weights do not match the configuration.
    """
    vicuna = vicuna_folder(folder, config)
    text = read_json(vicuna / "config.json")
    if text.get("model_type") != "llama":
        raise CheckpointError(f"{vicuna}/config.json: model_type is {text.get('model_type')!r}; Vicuna is 'llama'")
    state = _named("vicuna", vicuna, read_state(vicuna))
    ours = _to_config(folder / "config.json", config, text)
    with wrap_errors(CheckpointError, f"{folder}: its files cannot be put together"):
        state |= _with_key_biases(_whole_tower(folder / config["vision"], ours.vision_config.num_hidden_layers))
        for kind in ("qformer", "projection"):
            path = folder / str(config[kind])
            state |= _named(kind, path, read_wrapped(path))
    model: MiniGpt4 = build_model(folder, ours, state, dtype, MiniGpt4)
    return model


def read_own(folder: Path, dtype: torch.dtype) -> MiniGpt4:
    """The model, from a folder that alignkd saved.

    Raises:
        CheckpointError: a file is missing, or the weights do not match the configuration.
    """
    with wrap_errors(CheckpointError, f"{folder}/config.json is not the configuration of a MiniGPT-4"):
        saved = MiniGpt4Config.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model: MiniGpt4 = build_model(folder, saved, read_state(folder), dtype, MiniGpt4)
    return model


def _to_config(where: Path, config: dict[str, Any], text: dict[str, Any]) -> MiniGpt4Config:
    check_sizes(text, where)
    vision, qformer = (mapping(config, name, where) for name in ("vision_config", "qformer_config"))
    queries = integer(config, "num_query_tokens", where, 32, 1, 4096)
    with wrap_errors(CheckpointError, f"{where} is not the configuration of a MiniGPT-4"):
        return MiniGpt4Config(
            text_config=LlamaConfig(**text).to_dict(),
            vision_config=Blip2VisionConfig(**vision).to_dict(),
            qformer_config=Blip2QFormerConfig(**qformer).to_dict(),
            num_query_tokens=queries,
        )


def _named(kind: str, path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A file's tensors under transformers' names."""
    about, renamed, unknown = _KINDS[kind], {}, []
    for name, tensor in state.items():
        if re.match(about.unused, name):
            continue
        for pattern, replacement in about.rules:
            new, hits = re.subn(pattern, replacement, name)
            if hits:
                renamed[new] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        more = " ..." if len(unknown) > 4 else ""
        raise CheckpointError(f"{path} holds {', '.join(sorted(unknown)[:4])}{more}, which no {kind} file of MiniGPT-4 holds")
    return renamed


def _whole_tower(path: Path, layers: int) -> dict[str, torch.Tensor]:
    """The tower's tensors without the blocks after its last: the file has EVA's 40, BLIP-2 reads the 39th's output."""
    blocks = re.compile(r"^blocks\.(\d+)\.")
    state = read_wrapped(path)
    kept = {k: v for k, v in state.items() if (found := blocks.match(k)) is None or int(found[1]) < layers}
    return _named("vision", path, kept)


def _with_key_biases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """EVA's queries and values have a bias and its keys none: here all three are one, with zeros for the keys."""
    joined = {name: tensor for name, tensor in state.items() if not name.endswith(("q_bias", "v_bias"))}
    for name, query in state.items():
        if name.endswith("q_bias"):
            value = state.get(name.removesuffix("q_bias") + "v_bias", query[:0])
            joined[name.removesuffix("q_bias") + "qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return joined

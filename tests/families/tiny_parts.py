"""Small configurations that the builders of several families share."""

from __future__ import annotations

from typing import Any


def text_settings(tokenizer: Any, **changes: Any) -> dict[str, Any]:
    """Of a decoder in Llama's manner: two layers, four heads, grouped keys; weights so large that attention is no mean."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "initializer_range": 0.2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **changes,
    }


def look_near(tower: Any) -> None:
    """Make what a SigLIP tower sees of a place stay in its place: its random layers are larger than others' and mix all."""
    for layer in tower.encoder.layers:
        for part in (layer.self_attn.out_proj, layer.mlp.fc2):
            part.weight.data.mul_(0.05)


def tower_settings(**changes: Any) -> dict[str, Any]:
    """Of a vision transformer: 32 x 32 pixels, 4 x 4 patches."""
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        **changes,
    }

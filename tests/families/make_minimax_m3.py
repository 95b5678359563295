"""MiniMax M3: each row reads the best blocks of keys; alignkd has no class of its own for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_parts import text_settings
from tiny_tokenizers import byte_level
from transformers import MiniMaxM3SparseForConditionalGeneration, MiniMaxM3VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alignkd.models.encoders.processors import without_videos

IMAGE = "]<]image[>["
SPECIALS = ["<|im_start|>", "<|im_end|>", IMAGE, "]<]video[>[", "]<]vision_start[>[", "]<]vision_end[>["]
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}{%- for content in message.content %}"
    "{%- if content.type == 'image' %}]<]image[>[{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def write(folder: Path, seed: int = 0) -> None:
    tokenizer = byte_level(SPECIALS, eos="<|im_end|>", pad="<|endoftext|>")
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1600, temporal_patch_size=2)
    processor = without_videos("MiniMaxM3VLProcessor")(images, tokenizer, chat_template=TEMPLATE)
    sparse = {
        "layer_types": ["minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense"] * 2,
        "index_block_size": 8,
        "index_head_dim": 8,
        "index_local_blocks": 1,
        "index_n_heads": 2,
        "index_topk_blocks": 3,
        "head_dim": 8,
        "rotary_dim": 8,
        "dense_intermediate_size": 48,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    }
    config = MiniMaxM3VLConfig(
        text_config={"model_type": "minimax_m3_vl_text", **text_settings(tokenizer, **sparse)},
        vision_config={
            "model_type": "minimax_m3_vl_vision",
            "hidden_size": 24,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids("]<]video[>["),
        projector_hidden_size=32,
        merged_hidden_size=128,
    )
    torch.manual_seed(seed)
    MiniMaxM3SparseForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)

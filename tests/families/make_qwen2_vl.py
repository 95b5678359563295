"""Qwen2-VL: the prompts of its successor; alignkd has no class of its own for it."""

from __future__ import annotations

from pathlib import Path

import torch
from make_qwen2_5_vl import SPECIALS, TEMPLATE, image_ids
from tiny_parts import text_settings
from tiny_tokenizers import byte_level
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alignkd.models.encoders.processors import without_videos


def write(folder: Path, seed: int = 0) -> None:
    tokenizer = byte_level(SPECIALS, eos="<|im_end|>", pad="<|endoftext|>")
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1600, temporal_patch_size=2)
    processor = without_videos("Qwen2VLProcessor")(images, tokenizer, chat_template=TEMPLATE)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = Qwen2VLConfig(
        text_config=text_settings(tokenizer, rope_parameters=rope),
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        **image_ids(tokenizer),
    )
    torch.manual_seed(seed)
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)

"""HyperCLOVA X Vision: logits multiplied after the head; alignkd has no class of its own for it."""

from __future__ import annotations

from pathlib import Path

import torch
from make_qwen2_5_vl import SPECIALS, TEMPLATE
from tiny_parts import text_settings
from tiny_tokenizers import byte_level
from transformers import HyperCLOVAXVisionV2Config, HyperCLOVAXVisionV2ForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alignkd.models.encoders.processors import without_videos


def write(folder: Path, seed: int = 0, scale: float = 0.3) -> None:
    tokenizer = byte_level(SPECIALS, eos="<|im_end|>", pad="<|endoftext|>")
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, min_pixels=64, max_pixels=1600, temporal_patch_size=2)
    processor = without_videos("HyperCLOVAXVisionV2Processor")(images, tokenizer, chat_template=TEMPLATE)
    text = {"model_type": "hyperclovax", "logits_scaling": scale, "attention_multiplier": 0.5, "head_dim": 8}
    config = HyperCLOVAXVisionV2Config(
        text_config=text_settings(tokenizer, **text),
        vision_config={
            "model_type": "qwen2_5_vl_vision",
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
    )
    torch.manual_seed(seed)
    HyperCLOVAXVisionV2ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)

"""VipLLaVA: LLaVA with features of several layers of the tower; alignkd has no class of its own for it."""

from __future__ import annotations

from pathlib import Path

import torch
from make_llava import TEMPLATE
from tiny_parts import text_settings, tower_settings
from tiny_tokenizers import sentencepiece
from transformers import CLIPVisionConfig, LlamaConfig, LlavaProcessor, VipLlavaConfig, VipLlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def write(folder: Path, seed: int = 0) -> None:
    tokenizer = sentencepiece(["<image>"])
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**tower_settings()),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layers=[-2, -3],
        image_seq_length=16,
    )
    torch.manual_seed(seed)
    VipLlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)

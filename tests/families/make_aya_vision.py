"""Aya Vision: Cohere's roles, two tokens that end a turn, numbered tiles; alignkd has no class of its own for it."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_parts import text_settings, tower_settings
from tiny_tokenizers import byte_level
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    AyaVisionProcessor,
    Cohere2Config,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

TURN, END = "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"
IMAGE = ["<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE"]
SPECIALS = [TURN, "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", *IMAGE]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>"
    "{{ message.role | replace('user', '<|USER_TOKEN|>') | replace('assistant', '<|CHATBOT_TOKEN|><|START_RESPONSE|>') }}"
    "{% for item in message.content | selectattr('type', 'equalto', 'image') %}<image>{% endfor %}"
    "{% for item in message.content | selectattr('type', 'equalto', 'text') %}{{ item.text }}{% endfor %}"
    "{% if message.role == 'assistant' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)


def write(folder: Path, seed: int = 0) -> None:
    tokenizer = byte_level(SPECIALS, bos="<BOS_TOKEN>", eos=END, pad="<PAD>")
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4)
    processor = AyaVisionProcessor(images, tokenizer, patch_size=8, img_size=32, downsample_factor=2, chat_template=TEMPLATE)
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**tower_settings(vision_use_head=False)),
        text_config=Cohere2Config(**text_settings(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    torch.manual_seed(seed)
    AyaVisionForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)

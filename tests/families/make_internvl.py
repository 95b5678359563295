"""InternVL 3: ChatML, tiles of 2 x 2 tokens after pixel shuffling, Qwen2 as its decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_parts import text_settings
from tiny_tokenizers import byte_level
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from alignkd.models.encoders.processors import without_videos

NAMED = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)


def write(folder: Path, seed: int = 0, text: Callable[..., Any] = Qwen2Config, **changes: Any) -> None:
    """``text``: the decoder's configuration, with ``changes``; sinks of its attention get numbers that matter."""
    specials = ["<|im_start|>", *NAMED.values()]
    tokenizer = byte_level(specials, eos="<|im_end|>", pad="<|endoftext|>", extra_special_tokens=NAMED)
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=6)
    processor = without_videos("InternVLProcessor")(images, tokenizer, image_seq_length=4, chat_template=TEMPLATE)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=(32, 32),
            patch_size=(8, 8),
        ),
        text_config=text(**text_settings(tokenizer, **changes)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if "sink" in name:
            parameter.data.normal_()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

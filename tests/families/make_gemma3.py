"""Gemma 3: image tokens see each other both ways, the first layer has a sliding window, newlines stand around an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_parts import look_near, text_settings, tower_settings
from tiny_tokenizers import sentencepiece
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

NAMED = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
TEMPLATE = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}"
    "{%- endif -%}{{ '<start_of_turn>' + role + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def write(folder: Path, seed: int = 0, **changes: Any) -> None:
    tokenizer = sentencepiece(
        ["<start_of_turn>", "<end_of_turn>", *NAMED.values()],
        bos="<bos>",
        eos="<eos>",
        prefix_space=False,
        extra_special_tokens=NAMED,
    )
    tokenizer.add_tokens(["\n\n", "\n\n\n"])  # so that a newline before an image and the image's own become one piece
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=TEMPLATE)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**tower_settings(), vision_use_head=False),
        text_config=Gemma3TextConfig(**_text(tokenizer) | changes),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(NAMED["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(NAMED["eoi_token"]),
        image_token_index=tokenizer.convert_tokens_to_ids(NAMED["image_token"]),
    )
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)  # made of zeros
    look_near(model.model.vision_tower)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _text(tokenizer: Any) -> dict[str, Any]:
    kinds = ["sliding_attention", "full_attention"]
    return text_settings(tokenizer, head_dim=8, query_pre_attn_scalar=8, sliding_window=12, layer_types=kinds)

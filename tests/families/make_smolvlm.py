"""SmolVLM: an image is cut in tiles, each behind a token of its row and column, with the whole image last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_parts import text_settings, tower_settings
from tiny_tokenizers import byte_level
from transformers import LlamaConfig, SmolVLMConfig, SmolVLMForConditionalGeneration
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from alignkd.models.encoders.processors import without_videos

TILES = ["<global-img>", *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4))]
NAMED = {
    "fake_image_token": "<fake_token_around_image>",
    "image_token": "<image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
}
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def image_settings() -> dict[str, Any]:
    """Up to 2 x 2 tiles of 32 x 32 pixels."""
    return {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}


def write(folder: Path, seed: int = 0) -> None:
    tokenizer = byte_level(
        [*NAMED.values(), *TILES],
        bos="<|im_start|>",
        eos="<end_of_utterance>",
        pad="<|im_end|>",
        extra_special_tokens=NAMED,
    )
    images = SmolVLMImageProcessorPil(**image_settings())
    processor = without_videos("SmolVLMProcessor")(images, tokenizer, None, image_seq_len=4, chat_template=TEMPLATE)
    config = SmolVLMConfig(
        vision_config=tower_settings(),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    SmolVLMForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)

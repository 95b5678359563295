"""Idefics3: SmolVLM's tiles before a Llama 3, whose tokenizer adds a start token that the template writes, too."""

from __future__ import annotations

from pathlib import Path

import torch
from make_smolvlm import NAMED, TEMPLATE, TILES, image_settings
from tiny_parts import text_settings, tower_settings
from tiny_tokenizers import byte_level
from tokenizers.processors import TemplateProcessing
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, LlamaConfig
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

START = "<|begin_of_text|>"


def write(folder: Path, seed: int = 0) -> None:
    tokenizer = byte_level([*NAMED.values(), *TILES], bos=START, eos="<|eot_id|>", pad="<|end_of_text|>")
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A",
        pair=f"{START} $A {START} $B",
        special_tokens=[(START, tokenizer.convert_tokens_to_ids(START))],
    )
    images = Idefics3ImageProcessorPil(**image_settings())
    template = TEMPLATE.replace("<|im_start|>", START)
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)
    config = Idefics3Config(
        vision_config=tower_settings(),
        text_config=LlamaConfig(**text_settings(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)

"""PaliGemma: images, a question seen both ways, a newline, and the answer; no chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_parts import look_near, text_settings, tower_settings
from tiny_tokenizers import sentencepiece
from transformers import (
    Gemma2Config,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


def write(folder: Path, seed: int = 0) -> None:
    processor = make_processor()
    # Tied embeddings that layers hardly change repeat the last token: a newline, and so an answer of nothing.
    text = GemmaConfig(**text_settings(processor.tokenizer, head_dim=8, initializer_range=0.2))
    _save(folder, seed, processor, text)


def write_second_generation(folder: Path, seed: int = 0, **changes: Any) -> None:
    """PaliGemma 2, whose decoder caps scores and logits."""
    processor = make_processor()
    _save(folder, seed, processor, Gemma2Config(**text_settings(processor.tokenizer, head_dim=8, **changes)))


def plain(folder: Path, turns: Sequence[tuple[str, str]], images: Sequence[Image.Image], opened: bool) -> dict[str, Any]:
    """What its own processor makes of a question and its answer; ``opened``: of the question."""
    question = " ".join(part.strip() for part in turns[0][1].split("<image>")).strip()
    given = {} if opened else {"suffix": [turns[1][1]]}
    processor = PaliGemmaProcessor.from_pretrained(folder, backend="pil")
    made = processor(text=["<image>" * len(images) + question], images=[list(images)], return_tensors="pt", **given)
    return {name: value for name, value in made.items() if name != "labels"}


def make_processor() -> PaliGemmaProcessor:
    tokenizer = sentencepiece([], bos="<bos>", eos="<eos>", prefix_space=False)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=16)
    return PaliGemmaProcessor(images, tokenizer)


def _save(folder: Path, seed: int, processor: PaliGemmaProcessor, text: Any) -> None:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**tower_settings(), vision_use_head=False),
        text_config=text,
        image_token_index=processor.image_token_id,
        vocab_size=len(processor.tokenizer),
        projection_dim=text.hidden_size,
        hidden_size=text.hidden_size,
    )
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration(config)
    look_near(model.model.vision_tower)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

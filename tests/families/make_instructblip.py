"""InstructBLIP over Vicuna: queries of an image before the prompt, and a Q-Former that reads the question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_parts import text_settings, tower_settings
from tiny_tokenizers import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertTokenizerFast,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from alignkd.models.encoders.processors import load_processor

QUERIES = 4


def word_pieces() -> Any:
    """As BERT's, for the Q-Former."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator(["what colour is the cat? which is red? and the mat it"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return BertTokenizerFast(tokenizer_object=tokenizer)


def write(folder: Path, seed: int = 0, *, flan_t5: bool = False) -> None:
    tokenizer: PreTrainedTokenizerFast = sentencepiece(["<image>"])
    questions = word_pieces()
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    processor = InstructBlipProcessor(images, tokenizer, questions, num_query_tokens=QUERIES)
    text: Any = LlamaConfig(**text_settings(tokenizer))
    if flan_t5:
        text = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    qformer = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = InstructBlipConfig(
        vision_config=tower_settings(initializer_range=0.2),
        qformer_config={**qformer, "vocab_size": len(questions), "max_position_embeddings": 40, "initializer_range": 0.2},
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    model = InstructBlipForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    torch.nn.init.normal_(model.language_projection.weight, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def plain(folder: Path, turns: Sequence[tuple[str, str]], images: Sequence[Image.Image], opened: bool) -> dict[str, Any]:
    """The processor's inputs for the first question; answers and later questions follow, without a start token."""
    del opened  # a prompt is nothing but the question
    processor = load_processor(folder, "instructblip")
    shown = list(images) or [Image.new("RGB", (8, 8))]
    given = dict(processor(images=shown[0], text=turns[0][1].replace("<image>", "").strip(), return_tensors="pt"))
    tail = given["input_ids"][0, QUERIES:].tolist()
    for speaker, text in turns[1:]:
        tail += processor.tokenizer(text.replace("<image>", "").strip(), add_special_tokens=False).input_ids
        tail += [processor.tokenizer.eos_token_id] if speaker == "gpt" else []
    ids = given["input_ids"][0, :1].tolist() * QUERIES * len(images) + tail
    # Without an image nothing reads what is seen of this one.
    pixels = torch.cat([processor.image_processor(image, return_tensors="pt")["pixel_values"] for image in shown])
    questions = {name: given[name].expand(len(shown), -1) for name in ("qformer_input_ids", "qformer_attention_mask")}
    mask = torch.ones(1, len(ids), dtype=torch.long)
    return {"input_ids": torch.tensor([ids]), "attention_mask": mask, "pixel_values": pixels, **questions}

"""Make untrained checkpoints in the official MobileVLM V2 layout: tokenizer, tower, LDPv2 projector, Llama."""

import json
from pathlib import Path

import sentencepiece
from transformers import CLIPVisionModel, LlamaConfig

from alignkd.inputs.prompts import SYSTEM
from alignkd.models.checkpoints.tokenizer_files import load_tokenizer
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.loading import save_vlm
from alignkd.models.modules.mobilevlm import MobileVlm, MobileVlmConfig
from alignkd.pipeline.config.demo import LanguageModelSize
from alignkd.pipeline.data.easy_vqa import Question
from alignkd.pipeline.demo.tower import IMAGE_SETTINGS

VISION_GRID = 4
"""Side of the pooled grid: 16 vision tokens for an image of 64 x 64 pixels, where the published model has 144."""


def train_tokenizer(questions: list[Question], folder: Path) -> Path:
    """Train a SentencePiece tokenizer on the training questions; its files are written to ``folder``.

    The v1 template's system text is a single token, so that no CPU time is spent on a constant text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = [f"USER: \n{q.text} ASSISTANT: {q.answer}" for q in questions]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=[f"{SYSTEM} USER:".replace(" ", "\u2581"), "\u2581ASSISTANT:", "\n"],
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "model_max_length": 2048,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return folder


def new_checkpoint(tokenizer_folder: Path, tower: CLIPVisionModel, size: LanguageModelSize, folder: Path) -> Path:
    """Write an untrained model with this tower to ``folder``."""
    tokenizer = load_tokenizer(tokenizer_folder)
    config = MobileVlmConfig(
        vision_config=tower.config.to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ).to_dict(),
        vision_feature_layer=-1,
        projector_grid=VISION_GRID,
    )
    model = MobileVlm(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    vlm = MobileVlmFamily(model, tokenizer, tokenizer_folder, ImagePreprocessor(IMAGE_SETTINGS, "pad"))
    save_vlm(vlm, folder, official=True)
    return folder

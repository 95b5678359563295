"""Tokenizers trained in memory, of the two kinds that families use: GPT-2's byte level, and SentencePiece's with bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "USER: What colour is the cat? ASSISTANT: It is blue.",
    "user\nWhat is it?\nassistant\na dog and the mat, red or green, which is red?",
    "You are a helpful assistant. A chat between a curious human and an artificial intelligence assistant.",
]


def byte_level(specials: Sequence[str], *, eos: str, pad: str, bos: str | None = None, **settings: Any) -> Any:
    """As Qwen's and SmolLM's: no start token of its own, no space before the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False))
    return _finish(tokenizer, specials, eos=eos, pad=pad, bos=bos, **settings)


def sentencepiece(
    specials: Sequence[str],
    *,
    bos: str = "<s>",
    eos: str = "</s>",
    pad: str = "<pad>",
    prefix_space: bool = True,
    **settings: Any,
) -> Any:
    """As Llama's: a start token, a space before the text, and bytes for characters that have no piece."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    space = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), space]) if prefix_space else space
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix_space else []),
        ]
    )
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Pieces begin with a space or hold none, and a line's end has no piece: as Llama's.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=len(pieces) + 120, special_tokens=pieces, show_progress=False)
    _train(tokenizer, trainer)
    tokenizer.pre_tokenizer = None
    fast = _finish(tokenizer, specials, eos=eos, pad=pad, bos=bos, unk_token="<unk>", **settings)
    start = fast.convert_tokens_to_ids(bos)
    fast._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, start)]
    )
    return fast


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator([" ".join(text.split()) for text in TEXT] * 3, trainer)


def _finish(
    tokenizer: Tokenizer, specials: Sequence[str], *, eos: str, pad: str, bos: str | None, **settings: Any
) -> PreTrainedTokenizerFast:
    names = list(dict.fromkeys([*([bos] if bos else []), eos, pad, *specials]))
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad, **settings)

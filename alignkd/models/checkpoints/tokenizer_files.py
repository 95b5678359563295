"""A checkpoint's tokenizer: load it, check that it belongs to the model, copy its files."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.models.config_files import without_own_code
from alignkd.models.encoders.llama_tokenizer import LlamaSentencePieceTokenizer

_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer: SentencePiece where there is a ``tokenizer.model``, else ``tokenizer.json``.

    Raises:
        CheckpointError: neither file is there, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise CheckpointError(f"{folder} holds no tokenizer: expected tokenizer.model or tokenizer.json")
    with wrap_errors(CheckpointError, f"{folder}: the tokenizer cannot be read"), without_own_code(folder):
        if (folder / "tokenizer.model").is_file():
            tokenizer = LlamaSentencePieceTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
            # As the training code of LLaVA and MobileVLM: it counts a prompt's ids without those that pad.
            tokenizer.pad_token = tokenizer.unk_token
        tokenizer("a")
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: Any, vocabulary: int) -> None:
    """Refuse a tokenizer that does not belong to a model with so many tokens.

    Raises:
        CheckpointError: it has more tokens, or no start or end token.
    """
    beyond = sorted(token for token, number in tokenizer.get_vocab().items() if number >= vocabulary)
    if beyond and len(tokenizer) <= vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has {beyond[0]!r} beside the model's vocabulary of {vocabulary} tokens, so its id has no"
            " embedding: correct added_tokens.json, or resize the model's embeddings"
        )
    if len(tokenizer) > vocabulary:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but the model {vocabulary}; they do not belong together"
        )
    if missing := [name for name in ("bos_token", "eos_token") if getattr(tokenizer, f"{name}_id") is None]:
        raise CheckpointError(f"{folder}: the tokenizer has no {' and no '.join(missing)}; tokenizer_config.json must name it")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files unchanged: a converted tokenizer is another tokenizer."""
    for name in _FILES:
        if (source / name).is_file() and source.resolve() != target.resolve():
            shutil.copyfile(source / name, target / name)

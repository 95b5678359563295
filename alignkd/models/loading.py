"""``load_vlm(folder)`` and ``save_vlm(vlm, folder)``: the two ways in and out of every family."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from alignkd.models.images import ImagePreprocessor
from alignkd.models.llama_tokenizer import LlamaSentencePieceTokenizer
from alignkd.models.mobilevlm import MobileVlm, MobileVlmConfig
from alignkd.models.official_layout import build_model, copy_tokenizer, read_official, write_official
from alignkd.models.state_files import read_json, read_state
from alignkd.models.vlm import Vlm


def load_vlm(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    vision_tower: Path | None = None,
) -> Vlm:
    """Load a vision-language model from a local folder, in the official MobileVLM V2 layout or as alignkd saved it.

    Raises:
        ValueError: not a checkpoint, a family that is not known, weights that do not fit, or no tokenizer.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    kind = config.get("model_type")
    if kind == "mobilevlm":
        model, images = read_official(folder, config, dtype, vision_tower)
    elif kind == MobileVlmConfig.model_type:
        model, images = _read_own(folder, dtype)
    else:
        raise ValueError(
            f"{folder}/config.json: model_type is {kind!r}; known are 'mobilevlm' (the official MobileVLM V2 folders)"
            f" and {MobileVlmConfig.model_type!r} (saved by alignkd)"
        )
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but the model {model.config.text_config.vocab_size};"
            " they do not belong together"
        )
    model.eval().to(device)
    return Vlm(model, tokenizer, images, folder, official_config=config if kind == "mobilevlm" else None)


def _read_own(folder: Path, dtype: torch.dtype) -> tuple[MobileVlm, ImagePreprocessor]:
    config = MobileVlmConfig.from_pretrained(folder, local_files_only=True)
    state = read_state(folder)
    if config.tie_word_embeddings and "model.language_model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.language_model.embed_tokens.weight"])
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no preprocessor_config.json; save it again with alignkd, or copy it there")
    return build_model(folder, config, state, dtype), ImagePreprocessor(read_json(path), config.image_aspect_ratio)


def save_vlm(vlm: Vlm, folder: str | Path, *, official: bool = False) -> None:
    """Write the model, tokenizer and preprocessing in Hugging Face form, or in the official MobileVLM V2 layout."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if official:
        write_official(vlm.model, folder, tower_name="./clip", original=vlm.official_config)
        (folder / "clip").mkdir(exist_ok=True)
        (folder / "clip" / "config.json").write_text(vlm.model.config.vision_config.to_json_string())
    else:
        vlm.model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "CLIPImageProcessor", **vlm.images.settings}, indent=2)
    )
    copy_tokenizer(vlm.folder, folder)


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``.

    Raises:
        ValueError: no such folder or file, or not JSON.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the local folder of a checkpoint")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a checkpoint: it holds no config.json")
    return read_json(path)


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer: SentencePiece where there is a ``tokenizer.model``, else ``tokenizer.json``.

    Raises:
        ValueError: neither file is there, or it cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ValueError(f"{folder} holds no tokenizer: expected tokenizer.model or tokenizer.json")
    try:
        if (folder / "tokenizer.model").is_file():
            tokenizer = LlamaSentencePieceTokenizer.from_pretrained(folder, local_files_only=True)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder}: the tokenizer cannot be read ({type(error).__name__}): {str(error)[:200]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token
    return tokenizer

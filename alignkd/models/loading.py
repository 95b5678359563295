"""``load_vlm(folder)`` and ``save_vlm(vlm, folder)``: the two ways in and out of every family."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from alignkd.models.checkpoints.minigpt4_layout import is_official, read_released, vicuna_folder
from alignkd.models.checkpoints.mobilevlm_layout import build_model, read_official
from alignkd.models.checkpoints.state_files import read_json, read_state
from alignkd.models.encoders.images import ImagePreprocessor
from alignkd.models.encoders.llama_tokenizer import LlamaSentencePieceTokenizer
from alignkd.models.encoders.processors import load_processor
from alignkd.models.families import family_class
from alignkd.models.families.minigpt4 import MiniGpt4Family, image_settings
from alignkd.models.families.mobilevlm import MobileVlmFamily
from alignkd.models.modules.minigpt4 import MiniGpt4, MiniGpt4Config
from alignkd.models.modules.mobilevlm import MobileVlm, MobileVlmConfig
from alignkd.models.transformers_vlm import TransformersVlm
from alignkd.models.vlm import Vlm


def load_vlm(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    vision_tower: Path | None = None,
) -> Vlm:
    """Load a vision-language model from a local folder: as released, or as alignkd or transformers saved it.

    Raises:
        ValueError: not a checkpoint, a family that is not known, weights that do not fit, or no tokenizer.
    """
    folder = Path(folder)
    config = read_config(folder)
    kind = config.get("model_type")
    if kind is None:
        raise ValueError(f"{folder}/config.json names no model_type: what kind of model it is cannot be known")
    if kind == MiniGpt4Config.model_type:
        return _read_minigpt4(folder, config, dtype, device)
    if kind not in ("mobilevlm", MobileVlmConfig.model_type):
        return _read_transformers(folder, str(kind), dtype, device)
    tokenizer = load_tokenizer(folder)
    if kind == "mobilevlm":
        model, images = read_official(folder, config, dtype, vision_tower)
    else:
        model, images = _read_own(folder, dtype)
    _check_vocabulary(folder, tokenizer, model)
    model.eval().to(device)
    return MobileVlmFamily(model, tokenizer, folder, images, official_config=config if kind == "mobilevlm" else None)


def _check_vocabulary(folder: Path, tokenizer: Any, model: Any) -> None:
    if len(tokenizer) > model.config.text_config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens but the model {model.config.text_config.vocab_size};"
            " they do not belong together"
        )


def _read_minigpt4(folder: Path, config: dict[str, Any], dtype: torch.dtype, device: str | torch.device) -> MiniGpt4Family:
    """MiniGPT-4, from the files of its release or as alignkd saved it."""
    place = vicuna_folder(folder, config) if is_official(config) else folder
    tokenizer = load_tokenizer(place)
    if is_official(config):
        model = read_released(folder, config, dtype)
        settings = image_settings(int(model.config.vision_config.image_size))
    else:
        saved = MiniGpt4Config.from_pretrained(folder, local_files_only=True)
        model = build_model(folder, saved, read_state(folder), dtype, MiniGpt4)
        settings = _image_settings(folder)
    _check_vocabulary(folder, tokenizer, model)
    model.eval().to(device)
    return MiniGpt4Family(model, tokenizer, folder, ImagePreprocessor(settings, "stretch"), place)


def _read_transformers(folder: Path, kind: str, dtype: torch.dtype, device: str | torch.device) -> TransformersVlm:
    """A model that transformers knows.

    Raises:
        ValueError: it knows none of this kind, the weights do not fit, or the model cannot be aligned.
    """
    family = family_class(kind)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"{folder}/config.json: model_type is {kind!r}, which is no vision-language model known here: alignkd models lists"
            " those that are"
        )
    processor = load_processor(folder, kind)
    try:
        model, found = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises many kinds of error on files that are missing or damaged
        raise ValueError(f"{folder}: the model cannot be read ({type(error).__name__}: {str(error)[:300]})") from error
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, found[what])):
            raise ValueError(f"{folder}: the weights have {what.replace('_', ' ')}: {', '.join(names[:4])}")
    model.eval().to(device)
    vlm = family(model, processor.tokenizer, folder, processor)
    vlm.check()
    return vlm


def _read_own(folder: Path, dtype: torch.dtype) -> tuple[MobileVlm, ImagePreprocessor]:
    config = MobileVlmConfig.from_pretrained(folder, local_files_only=True)
    state = read_state(folder)
    if config.tie_word_embeddings and "model.language_model.embed_tokens.weight" in state:
        state.setdefault("lm_head.weight", state["model.language_model.embed_tokens.weight"])
    settings = _image_settings(folder)
    return build_model(folder, config, state, dtype), ImagePreprocessor(settings, config.image_aspect_ratio)


def _image_settings(folder: Path) -> dict[str, Any]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no preprocessor_config.json; save it again with alignkd, or copy it there")
    return read_json(path)


def save_vlm(vlm: Vlm, folder: str | Path, *, official: bool = False) -> None:
    """Write the model, tokenizer and preprocessing in Hugging Face form, or in the official MobileVLM V2 layout.

    Raises:
        ValueError: the family has no such layout.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not official:
        vlm.save(folder)
    elif isinstance(vlm, MobileVlmFamily):
        vlm.save_official(folder)
    else:
        raise ValueError(f"the official layout is MobileVLM's; {vlm.folder} is of the family {vlm.family}")


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

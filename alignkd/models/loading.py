"""``load_vlm(folder)`` and ``save_vlm(vlm, folder)`` for every family.

Importing this registers MobileVLM and MiniGPT-4 with the Auto classes of transformers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import alignkd.models.modules.minigpt4
import alignkd.models.modules.mobilevlm  # noqa: F401  both are registered with transformers when they are imported
from alignkd.errors import CheckpointError
from alignkd.extras import require
from alignkd.models.config_files import check_sizes, read_config, short
from alignkd.models.registry import family_class, find_record
from alignkd.models.tower_aside import whole
from alignkd.models.vlm import Vlm

_QUANTISERS = {
    **{"bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes"},
    **{"gptq": "gptqmodel", "awq": "gptqmodel", "compressed-tensors": "compressed_tensors", "torchao": "torchao", "hqq": "hqq"},
}
"""The packages by which transformers reads quantised weights."""


def load_vlm(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    vision_tower: Path | None = None,
) -> Vlm:
    """Load a vision-language model from a local folder: as released, or as alignkd or transformers saved it.

    Raises:
        CheckpointError: not a checkpoint, a family that is not supported, files that are damaged or do not belong together.
    """
    folder = Path(folder)
    family, config = _find_family(folder)
    return family.load(folder, config, dtype=dtype, device=device, vision_tower=vision_tower)


def describe_vlm(folder: str | Path, *, vision_tower: Path | None = None) -> Vlm | None:
    """A model without its weights, from the small files of its folder: enough to compare it with another model.

    None where its family cannot be described so.

    Raises:
        CheckpointError: as :func:`load_vlm`, but for the weights, which are not read.
    """
    folder = Path(folder)
    family, config = _find_family(folder)
    return family.describe(folder, config, vision_tower=vision_tower)


def _find_family(folder: Path) -> tuple[type[Vlm], dict[str, Any]]:
    config = read_config(folder)
    kind = config.get("model_type")
    if kind is None:
        raise CheckpointError(f"{folder}/config.json names no model_type: which model family it is cannot be known")
    if not isinstance(kind, str):
        raise CheckpointError(f"{folder}/config.json: model_type is {short(kind)}, expected the name of a model family")
    _check_quantisation(config, folder)
    check_sizes(config, folder / "config.json")
    return family_class(find_record(kind)), config


def _check_quantisation(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a quantised checkpoint whose package is not installed, before its weights are read."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, Mapping) else None
    if method in _QUANTISERS:
        require(_QUANTISERS[method], f"the checkpoint {folder}, which is quantised ({method}),")


def save_vlm(vlm: Vlm, folder: str | Path, *, official: bool = False) -> None:
    """Write the model, tokenizer and preprocessing in Hugging Face form, or in the layout of the official release.

    Raises:
        CheckpointError: the family has no official layout.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(vlm):
        (vlm.save_official if official else vlm.save)(folder)

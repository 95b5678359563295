"""LoRA through PEFT: low-rank updates of the decoder's layers; projector and alignment adapters train whole."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alignkd.models.vlm import Vlm


@dataclass(frozen=True)
class LoraSettings:
    """Rank, scale (alpha / rank multiplies the update) and dropout of the updates."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0


def add_lora(student: Vlm, settings: LoraSettings) -> Any:
    """Freeze the student but for its projector, and put updates into its decoder, in place; the PEFT model.

    Raises:
        ValueError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError("--lora needs PEFT: pip install 'alignkd[lora]'") from error
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=_targets(student)
    )
    model = get_peft_model(student.model, config)
    student.projector.requires_grad_(True)
    return model


def _targets(student: Vlm) -> str:
    """A pattern of every linear layer in the decoder's layers, whatever the family calls them."""
    layers = student.decoder.layers
    path = next(name for name, module in student.model.named_modules() if module is layers)
    linear = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(path)}\..*\.({'|'.join(sorted(linear))})"


def merge_lora(model: Any, adapter: Path) -> None:
    """Write the updates in PEFT's form to a folder, then add them to the student's weights, in place."""
    model.save_pretrained(str(adapter))
    model.merge_and_unload()

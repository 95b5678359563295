"""LoRA through PEFT: low-rank updates of the decoder's layers. Projector and the objective's adapters train in full."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alignkd.errors import ConfigError
from alignkd.models.vlm import Vlm


@dataclass(frozen=True)
class LoraSettings:
    """``alpha / rank`` multiplies an update; ``dropout`` acts on its input."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0


def add_lora(student: Vlm, settings: LoraSettings) -> Any:
    """Freeze the student except its projector, and add updates to its decoder, in place. Returns the PEFT model.

    Raises:
        ConfigError: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("--lora needs PEFT: pip install 'alignkd[lora]'") from error
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=_targets(student)
    )
    model = get_peft_model(student.model, config)
    student.projector.requires_grad_(True)
    return model


def _targets(student: Vlm) -> str:
    """A pattern that matches every linear layer of the decoder, whatever names the model family gives them."""
    layers = student.decoder.layers
    path = next(name for name, module in student.model.named_modules() if module is layers)
    linear = {name.rpartition(".")[2] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    return rf"{re.escape(path)}\..*\.({'|'.join(sorted(linear))})"


def merge_lora(model: Any, adapter: Path) -> None:
    """Write the updates to a folder in PEFT's form, then add them to the student's weights, in place."""
    model.save_pretrained(str(adapter))
    model.merge_and_unload()

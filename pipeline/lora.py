"""LoRA through PEFT: low-rank updates of the decoder's layers; projector and alignment adapters train whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignkd.models.vlm import Vlm

_TARGETS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


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
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=_TARGETS)
    model = get_peft_model(student.model, config)
    student.projector.requires_grad_(True)
    return model


def merge_lora(model: Any, adapter: Path) -> None:
    """Write the updates in PEFT's form to a folder, then add them to the student's weights, in place."""
    model.save_pretrained(str(adapter))
    model.merge_and_unload()

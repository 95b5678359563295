"""LoRA through PEFT: low-rank updates of the decoder's layers. Projector and the objective's adapters train in full.

A run writes an adapter that PEFT reads by its own convention: ``modules_to_save`` holds the projector, so that base and adapter
together are the trained student. The objective's adapters serve the loss alone and are no part of it.
"""

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from alignkd.models.transformers_vlm import TransformersVlm
from alignkd.models.vlm import Vlm
from alignkd.pipeline.runtime.files import replace_text


@dataclass(frozen=True)
class LoraSettings:
    """``alpha / rank`` multiplies an update; ``dropout`` acts on its input."""

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0


def add_lora(student: Vlm, settings: LoraSettings) -> Any:
    """Freeze the student except its projector, and add updates to its decoder, in place. Returns the PEFT model."""
    from peft import LoraConfig, get_peft_model

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


def merge_lora(model: Any, student: Vlm, adapter: Path) -> None:
    """Write updates and projector to a folder in PEFT's form, then add the updates to the student's weights, in place."""
    write_adapter(model, student, adapter, merged="`../student` is base and adapter, merged.")
    model.merge_and_unload()


def write_adapter(model: Any, student: Vlm, adapter: Path, *, merged: str = "") -> None:
    """Write updates and projector to a folder in PEFT's form. ``merged``: a sentence for its card."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    adapter.mkdir(parents=True, exist_ok=True)
    whole = dict(_trained_whole(student))
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, module in whole.items():
        # PEFT stores a module of modules_to_save under its path in the base model.
        state |= {f"base_model.model.{name}.{key}": value for key, value in module.state_dict().items()}
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = os.path.abspath(student.folder)
    config.modules_to_save = list(whole)
    base = type(student.model)
    config.save_pretrained(
        str(adapter), auto_mapping_dict={"base_model_class": base.__name__, "parent_library": base.__module__}
    )
    replace_text(adapter / "README.md", _card(student, config, adapter, merged))


def _trained_whole(student: Vlm) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules all of whose parameters are the projector's, with their paths in the model.

    Lists are entered: PEFT takes modules that have a forward alone.
    """
    trained = {id(parameter) for parameter in student.projector.parameters()}
    found: list[str] = []
    for path, module in student.model.named_modules():
        parameters = [id(parameter) for parameter in module.parameters()]
        inside = any(path.startswith(f"{name}.") for name in found)
        if parameters and trained.issuperset(parameters) and not inside and not isinstance(module, nn.ModuleList):
            found.append(path)
            yield path, module


def _card(student: Vlm, config: Any, adapter: Path, merged: str) -> str:
    base = config.base_model_name_or_path
    if isinstance(student, TransformersVlm):
        load = [
            "from transformers import AutoModelForImageTextToText",
            "",
            f'base = AutoModelForImageTextToText.from_pretrained("{base}")',
        ]
    else:
        load = ["from alignkd.models.loading import load_vlm", "", f'base = load_vlm("{base}").model']
    return "\n".join(
        [
            *("---", f"base_model: {base}", "library_name: peft", "tags: [lora, alignkd]", "---", ""),
            "# LoRA adapter of a distilled student",
            "",
            f"Base: `{base}` ({student.family}). Trained from it by `alignkd distill --lora`:",
            "",
            f"* low-rank updates (rank {config.r}, alpha {config.lora_alpha}) of every linear layer of the decoder's layers;",
            f"* the whole projector (`modules_to_save`: {', '.join(f'`{name}`' for name in config.modules_to_save)}).",
            "",
            "Everything else is the base's: embeddings and output head, tied or not, are unchanged. The adapters that the",
            f"distillation loss trained beside the student are no part of it. {merged}".rstrip(),
            "",
            *("```python", "from peft import PeftModel", *load),
            f'model = PeftModel.from_pretrained(base, "{os.path.abspath(adapter)}").merge_and_unload()',
            *("```", ""),
        ]
    )

"""Our own model classes, filled with a checkpoint's tensors: exactly theirs, each of its shape."""

from pathlib import Path
from typing import Any

import torch

from alignkd.errors import CheckpointError, wrap_errors


def build_model(folder: Path, config: Any, state: dict[str, torch.Tensor], dtype: torch.dtype, model_class: type[Any]) -> Any:
    """A model with exactly these weights. No memory is taken for the configured sizes before they match.

    Raises:
        CheckpointError: no model can be made of the configuration; a tensor is missing, is not the model's, or has another
            shape.
    """
    with wrap_errors(CheckpointError, f"{folder}: no model can be made of its configuration"), torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in model_class(config).state_dict().items()}
    missing = sorted(set(expected) - set(state))
    unexpected = sorted(set(state) - set(expected))
    misshapen = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    for what, names in (("lack", missing), ("also hold", unexpected), ("do not match the configuration:", misshapen)):
        if names:
            raise CheckpointError(f"{folder}: the weights {what} {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}")
    with wrap_errors(CheckpointError, f"{folder}: the model cannot be made"):
        return model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, trust_remote_code=False, local_files_only=True
        )

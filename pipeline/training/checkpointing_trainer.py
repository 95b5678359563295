"""transformers' Trainer with checkpoints of our own kind: shared tensors once, sealed, counted by their own names."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from alignkd.errors import AlignkdError, CheckpointError
from alignkd.pipeline.runtime.out_of_memory import is_out_of_memory


@contextmanager
def loading_checkpoint(folder: str | Path | None) -> Iterator[None]:
    """Turn what torch, safetensors and transformers raise on damaged files into one message.

    Raises:
        CheckpointError: names the checkpoint and what to do. Errors of storage and of memory pass unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, AlignkdError | OSError) or is_out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(
            f"--resume: the checkpoint {folder} is damaged or is not of this run ({cause}). Remove this folder, and --resume"
            " starts from the checkpoint before it"
        ) from error


def deduplicated_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict that holds each tensor once, under its first name: safetensors refuses tensors that share memory."""
    kept: dict[Any, str] = {}
    for name, tensor in state.items():
        kept.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name, name)
    return {name: state[name] for name in kept.values()}


class CheckpointingTrainer(Trainer):  # type: ignore[misc]
    """Trainer that saves shared tensors once, and explains a checkpoint that cannot be loaded."""

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        """Save tensors that two modules share, such as a tied output head, once."""
        super()._save(output_dir, deduplicated_state(self.model.state_dict() if state_dict is None else state_dict))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Accept the names that :meth:`_save` left out: their tensors were loaded under another name.

        Raises:
            CheckpointError: other weights are missing, or are not known.
        """
        saved = set(deduplicated_state(self.model.state_dict()))
        differing = [*(set(load_result.missing_keys) & saved), *load_result.unexpected_keys]
        if differing:
            names = ", ".join(sorted(differing)[:4])
            raise CheckpointError(
                f"--resume: the checkpoint does not hold this student's weights: {names}; choose another --out"
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with loading_checkpoint(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with loading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with loading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

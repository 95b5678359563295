"""Read a checkpoint's tensors, memory-mapped and without unpickling anything else."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.models.config_files import read_json

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, in one file or in shards, safetensors or ``.bin``.

    Raises:
        CheckpointError: no weight file, a shard outside the folder or missing, or a file that cannot be read as tensors.
    """
    for name in _INDEX:
        if (folder / name).is_file():
            state: dict[str, torch.Tensor] = {}
            for shard in _shards(folder / name):
                state.update(_read_shard(folder / shard))
            return state
    for name in _SINGLE:
        if (folder / name).is_file():
            return _tensors(_load(folder / name))
    raise CheckpointError(f"{folder} holds no weights: expected one of {', '.join(_SINGLE + _INDEX)}")


def read_wrapped(path: Path) -> dict[str, torch.Tensor]:
    """One file of tensors by name, or of those under ``model``, as training code that saves its whole state does.

    Raises:
        CheckpointError: it is missing, or cannot be read as tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy it there, or name its path in config.json")
    state = _load(path)
    return _tensors(state["model"] if isinstance(state.get("model"), dict) else state)


def _shards(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names; copy the whole folder again")
    for name in names.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not a plain file name")
    return sorted(set(names.values()))


def _read_shard(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is named by the checkpoint's index but is missing; copy the whole folder again")
    return _tensors(_load(path))


def _load(path: Path) -> dict[Any, Any]:
    with wrap_errors(CheckpointError, f"{path} cannot be read as tensors"):
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # files older than torch 1.6's zip format cannot be memory-mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    return state


def _tensors(state: dict[Any, Any]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}

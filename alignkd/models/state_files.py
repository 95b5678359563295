"""Read a checkpoint's tensors, memory-mapped and without unpickling anything but tensors."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, in one file or in shards, safetensors or ``.bin``.

    Raises:
        ValueError: no weight file, a shard outside the folder or missing, or a file that cannot be read as tensors.
    """
    for name in _INDEX:
        if (folder / name).is_file():
            shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
            state: dict[str, torch.Tensor] = {}
            for shard in shards:
                if Path(shard).name != shard:
                    raise ValueError(f"{folder / name} names the shard {shard!r}, which is not a plain file name")
                state.update(_read_file(folder / shard))
            return state
    for name in _SINGLE:
        if (folder / name).is_file():
            return _read_file(folder / name)
    raise ValueError(f"{folder} holds no weights: expected one of {', '.join(_SINGLE + _INDEX)}")


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} is named by the checkpoint's index but is missing; copy the whole folder again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # files older than torch 1.6's zip format cannot be memory-mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as tensors ({type(error).__name__}): {str(error)[:200]}") from error
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}

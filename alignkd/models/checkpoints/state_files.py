"""Read a checkpoint's tensors, memory-mapped and without unpickling anything else.

Weights are dense tensors of real numbers. Files come from others, so that their tensors' kinds and sizes are compared with what
a file of that size can hold, and with a limit, before any memory is taken.
"""

import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from alignkd.errors import CheckpointError, ConfigError, wrap_errors
from alignkd.models.config_files import read_json

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

LIMIT_VARIABLE = "ALIGNKD_MAX_CHECKPOINT_GIB"
"""The environment variable that holds another limit than :data:`DEFAULT_GIB`."""
DEFAULT_GIB = 512.0

BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.position_ids|\.(masked_)?bias_mask|\.masked_bias|num_batches_tracked)$")
"""What older releases stored beside weights, and computed anew since."""
_REAL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_REAL_NAMES = frozenset({"F64", "F32", "F16", "BF16"})


def read_state(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, in one file or in shards, safetensors or ``.bin``.

    Raises:
        CheckpointError: no weight file, a shard outside the folder or missing, or a file that cannot be read as tensors.
    """
    for name in _INDEX:
        if (folder / name).is_file():
            state: dict[str, torch.Tensor] = {}
            for shard in _shards(folder / name):
                path = _shard(folder / shard)
                state.update(_tensors(path, _load(path)))
            return state
    for name in _SINGLE:
        if (folder / name).is_file():
            return _tensors(folder / name, _load(folder / name))
    raise CheckpointError(f"{folder} holds no weights: expected one of {', '.join(_SINGLE + _INDEX)}")


def read_wrapped(path: Path) -> dict[str, torch.Tensor]:
    """One file of tensors by name, or of those under ``model``, as training code that saves its whole state does.

    Raises:
        CheckpointError: it is missing, or cannot be read as tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: copy it there, or name its path in config.json")
    state = _load(path)
    return _tensors(path, state["model"] if isinstance(state.get("model"), dict) else state)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, in the order in which they are looked for; none where there are none.

    Raises:
        CheckpointError: an index names a file elsewhere, or one that is missing.
    """
    for name in (_SINGLE[0], _INDEX[0], _SINGLE[1], _INDEX[1]):
        if (folder / name).is_file():
            return [_shard(folder / shard) for shard in _shards(folder / name)] if name in _INDEX else [folder / name]
    return []


def check_weight_files(folder: Path) -> None:
    """Refuse weights that are no dense tensors of real numbers, before another library reads them.

    Raises:
        CheckpointError: names the first ones, and their kind.
    """
    sizes = 0
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with wrap_errors(CheckpointError, f"{path} cannot be read as tensors"), safe_open(path, "pt") as file:
                kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  not a mapping
            _refuse(path, (f"{name} ({kind})" for name, kind in kinds.items() if kind not in _REAL_NAMES and not _buffer(name)))
            sizes += path.stat().st_size
        else:
            sizes += sum(tensor.nbytes for tensor in _tensors(path, _load(path)).values())
    _check_size(folder, sizes)


def max_checkpoint_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """The most bytes that the weights of one checkpoint may take in memory.

    Raises:
        ConfigError: the environment variable is not a number above 0.
    """
    text = environment.get(LIMIT_VARIABLE, "")
    try:
        gib = float(text or DEFAULT_GIB)
        if not 0 < gib < 1 << 20:
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"{LIMIT_VARIABLE}={text}: expected a number of GiB above 0, such as {LIMIT_VARIABLE}=900") from error
    return int(gib * (1 << 30))


def _check_size(where: object, nbytes: int) -> None:
    if nbytes > (most := max_checkpoint_bytes()):
        raise CheckpointError(
            f"{where}: its weights take {nbytes:,} bytes in memory, more than {most:,}; if they are your own, set"
            f" {LIMIT_VARIABLE}={-(-nbytes // (1 << 30))}"
        )


def _buffer(name: str) -> bool:
    return BUFFERS.search(name) is not None


def _refuse(path: Path, wrong: Iterable[str]) -> None:
    if names := sorted(wrong):
        raise CheckpointError(
            f"{path} holds {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}: expected dense tensors of real numbers"
            " (float32, bfloat16, float16 or float64)"
        )


def _shards(index: Path) -> list[str]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names; copy the whole folder again")
    for name in names.values():
        if Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not a plain file name")
    return sorted(set(names.values()))


def _shard(path: Path) -> Path:
    if not path.is_file():
        raise CheckpointError(f"{path} is named by the checkpoint's index but is missing; copy the whole folder again")
    return path


def _load(path: Path) -> dict[Any, Any]:
    with wrap_errors(CheckpointError, f"{path} cannot be read as tensors"):
        if path.suffix == ".safetensors":
            return load_file(path)
        _check_archive(path)
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:  # files older than torch 1.6's zip format cannot be memory-mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, expected tensors by name")
    return state


def _check_archive(path: Path) -> None:
    """Refuse an archive whose parts are compressed, which torch never writes: a few bytes would fill the memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise CheckpointError(f"{path} is a compressed archive, which torch does not write: it is not read")


def _tensors(path: Path, state: dict[Any, Any]) -> dict[str, torch.Tensor]:
    found = {name: t for name, t in state.items() if isinstance(name, str) and isinstance(t, torch.Tensor)}
    _refuse(path, (f"{name} ({kind})" for name, t in found.items() if (kind := _wrong_kind(t)) and not _buffer(name)))
    _check_size(path, sum(t.nbytes for t in found.values()))
    return found


def _wrong_kind(tensor: torch.Tensor) -> str:
    """What a tensor is instead of dense and real; empty where it is both."""
    if tensor.layout != torch.strided:
        return str(tensor.layout).removeprefix("torch.")
    if tensor.is_meta:
        return "no values, on the meta device"
    if tensor.dtype not in _REAL:
        return str(tensor.dtype).removeprefix("torch.")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"{tensor.nbytes:,} bytes made of {tensor.untyped_storage().nbytes():,}"
    return ""

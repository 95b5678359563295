"""Read a checkpoint's JSON files, which others wrote: objects, whose values have the expected type and a sensible range."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.plain_files import read_plain

_MAX_BYTES = 64 * 2**20
_RANGES = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "n_layer"), (0, 1024)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "num_kv_heads"), (1, 1024)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size", "projection_dim"), (0, 2**20)),
    **dict.fromkeys(("head_dim", "attention_head_size", "v_head_dim"), (1, 2**14)),
    **dict.fromkeys(("patch_size", "image_size", "tile_size"), (1, 2**14)),
    **dict.fromkeys(("num_channels", "in_channels", "spatial_merge_size", "temporal_patch_size", "scale_factor"), (1, 1024)),
    **dict.fromkeys(("image_seq_length", "mm_tokens_per_image", "num_query_tokens"), (1, 2**16)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), (0, 2**14)),
    "max_position_embeddings": (0, 2**24),
    "vocab_size": (0, 2**24),
    "teacher_projector_width": (0, 2**20),
}
"""Least and most, far beyond every released model: larger ones would fill the memory before weights are compared."""
_POSITIVE = frozenset({"rms_norm_eps", "layer_norm_eps", "norm_eps", "rope_theta"})
_LAYERS = ("num_hidden_layers", "depth", "num_layers", "layers")


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``.

    Raises:
        CheckpointError: no such folder or file, or not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the local folder of a checkpoint")
    path = folder / "config.json"
    if not path.exists():
        student = folder / "student"
        beside = f"a run's student is {student}" if student.is_dir() else "give the folder that holds it beside the weights"
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no config.json; {beside}")
    _check_plain_files(folder)
    return read_json(path)


def _check_plain_files(folder: Path) -> None:
    """Refuse named pipes, sockets and devices, at which a library that reads the folder would wait for ever.

    Raises:
        CheckpointError: names the first one.
    """
    with wrap_errors(CheckpointError, f"{folder} cannot be read", OSError):
        for path in sorted(folder.iterdir()):
            if path.exists() and not path.is_file() and not path.is_dir():
                raise CheckpointError(f"{path} is a named pipe, a socket or a device, expected a plain file; remove it")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read, is not JSON, or holds something else.
    """
    with wrap_errors(CheckpointError, f"{path} is not JSON that can be read", OSError, ValueError, RecursionError):
        content = json.loads(read_plain(path, _MAX_BYTES).decode())
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def integer(config: Mapping[str, Any], name: str, where: object, default: int, least: int, most: int) -> int:
    """The whole number ``name`` of a configuration, from ``least`` to ``most``.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(name, default)
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = least - 1
    if not least <= number <= most:
        raise CheckpointError(f"{where}: {name} is {short(value)}, expected a whole number from {least} to {most}")
    return number


def mapping(config: Mapping[str, Any], name: str, where: object) -> dict[str, Any]:
    """The object ``name`` of a configuration, empty where it is left out.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(name, {})
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {name} is {short(value)}, expected an object")
    return value


def check_sizes(config: Mapping[str, Any], where: object) -> None:
    """Refuse numbers that no model has, in a configuration and in those that it contains.

    Raises:
        CheckpointError: names the first one.
    """
    vocabulary = config.get("vocab_size")
    for name, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, where)
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float) or isinstance(number, bool):
                continue
            least, most = _RANGES.get(name, (number, number))
            if name == "pad_token_id" and isinstance(vocabulary, int):
                least, most = -1, vocabulary - 1  # Llama's configurations have -1 where there is no such token
            if not least <= number <= most:
                raise CheckpointError(f"{where}: {name} is {short(value)}, expected {least} to {most:,}; the file is damaged")
            if name in _POSITIVE and not 0 < number < float("inf"):
                raise CheckpointError(f"{where}: {name} is {short(value)}, expected a number above 0; the file is damaged")


def check_feature_layers(config: Mapping[str, Any], where: object) -> None:
    """Refuse layers of the vision tower that it does not have: its states are those before its first layer and after each.

    Raises:
        CheckpointError: names the setting, its value, and how many layers the tower has.
    """
    vision = config.get("vision_config")
    depths = [vision[name] for name in _LAYERS if isinstance(vision.get(name), int)] if isinstance(vision, dict) else []
    for name in ("vision_feature_layer", "vision_feature_layers"):
        value = config.get(name)
        for layer in value if isinstance(value, list) else [] if value is None else [value]:
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise CheckpointError(f"{where}: {name} is {short(value)}, expected a whole number, or several")
            if depths and not -depths[0] - 1 <= layer <= depths[0]:
                raise CheckpointError(
                    f"{where}: {name} is {short(value)}, but the vision tower has {depths[0]} layers: expected"
                    f" {-depths[0] - 1} to {depths[0]}"
                )


@contextmanager
def without_own_code(folder: Path) -> Iterator[None]:
    """Tell of files that name code of their own (``auto_map``), which transformers would ask to run.

    Raises:
        CheckpointError: names the folder.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise CheckpointError(
            f"{folder}: its files name Python code of their own (auto_map), which alignkd never runs: use a checkpoint in"
            " transformers' own form"
        ) from error


def short(value: Any) -> str:
    """A value for a message, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

"""Read a checkpoint's JSON files, which others wrote: objects, whose values have the expected type and a sensible range."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError, wrap_errors
from alignkd.plain_files import read_plain

_MAX_BYTES = 64 * 2**20
_LARGEST = {
    "num_hidden_layers": 1024,
    "num_layers": 1024,
    "encoder_layers": 1024,
    "decoder_layers": 1024,
    "depth": 1024,
    "image_size": 2**14,
    "max_position_embeddings": 2**24,
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**20,
}
"""Far above every released model; a model of larger values would fill the memory before its weights are compared."""


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's ``config.json``.

    Raises:
        CheckpointError: no such folder or file, or not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the local folder of a checkpoint")
    path = folder / "config.json"
    if not path.exists():
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no config.json")
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
    """Refuse sizes that no model has, in a configuration and in those that it contains.

    Raises:
        CheckpointError: names the first one.
    """
    for name, value in config.items():
        if isinstance(value, dict):
            check_sizes(value, where)
        elif name in _LARGEST and isinstance(value, int | float) and not 0 <= value <= _LARGEST[name]:
            raise CheckpointError(f"{where}: {name} is {short(value)}, expected 0 to {_LARGEST[name]:,}; the file is damaged")


def short(value: Any) -> str:
    """A value for a message, cut at 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

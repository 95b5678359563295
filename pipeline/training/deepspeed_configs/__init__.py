"""DeepSpeed configurations for ``alignkd distill --deepspeed``: ZeRO stages 1, 2 and 3.

Each ``"auto"`` is filled in by transformers' Trainer from the command's own options. There is no optimizer section:
alignkd brings its own, with a group for the projector.
"""

import json
from pathlib import Path

_FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def deepspeed_config(name_or_file: str) -> Path:
    """The file of a shipped configuration (``zero1``, ``zero2``, ``zero3``), or the user's own ``.json``.

    Raises:
        ValueError: neither, or a file that holds no JSON object.
    """
    if name_or_file in SHIPPED:
        return _FOLDER / f"{name_or_file}.json"
    path = Path(name_or_file)
    if path.suffix != ".json":
        raise ValueError(f"--deepspeed {name_or_file}: known are {', '.join(SHIPPED)}, or a FILE.json")
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--deepspeed {path}: {error.strerror}; known are {', '.join(SHIPPED)}, or a FILE.json") from error
    except ValueError as error:
        raise ValueError(f"--deepspeed {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--deepspeed {path} holds {type(found).__name__}, expected an object with DeepSpeed's settings")
    return path

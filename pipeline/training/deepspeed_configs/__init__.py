"""DeepSpeed configurations for ``alignkd distill --deepspeed``: ZeRO stages 1, 2 and 3.

transformers' Trainer fills in each ``"auto"`` from the command's options. There is no optimizer section: alignkd makes its
own optimizer, with a parameter group for the projector.
"""

import json
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.plain_files import read_plain

_MAX_BYTES = 16 * 2**20
_FOLDER = Path(__file__).parent
SHIPPED = tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def read_deepspeed_config(name_or_file: str) -> dict[str, Any]:
    """A shipped configuration (``zero1``, ``zero2``, ``zero3``), or the user's own ``FILE.json``.

    Raises:
        ConfigError: neither, or a file that DeepSpeed cannot use.
    """
    path = _FOLDER / f"{name_or_file}.json" if name_or_file in SHIPPED else Path(name_or_file)
    known = f"known are {', '.join(SHIPPED)}, or a FILE.json"
    if path.suffix != ".json":
        raise ConfigError(f"--deepspeed {name_or_file}: {known}")
    try:
        found = json.loads(read_plain(path, _MAX_BYTES))
    except OSError as error:
        raise ConfigError(f"--deepspeed {path}: {error.strerror}; {known}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed {path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"--deepspeed {path} holds {type(found).__name__}, expected an object with DeepSpeed's settings")
    zero = found.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ConfigError(
            f"--deepspeed {path}: zero_optimization is {zero!r}, expected an object whose 'stage' is 0, 1, 2 or 3"
        )
    return found

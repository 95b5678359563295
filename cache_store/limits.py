"""What is read from a cache at most. A cache may come from a stranger, and a few bytes can claim any amount of memory."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from alignkd.errors import ConfigError

MAX_JSON_BYTES = 64 << 20
"""The longest manifest, record or index that is parsed: parsed JSON takes about ten times its bytes."""

MAX_JSON_DEPTH = 64
"""The most lists and mappings within each other."""

LIMIT_VARIABLE = "ALIGNKD_MAX_DECODED_GIB"
"""The environment variable that holds another limit than :data:`DEFAULT_DECODED_GIB`."""

DEFAULT_DECODED_GIB = 8.0

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def max_decoded_bytes(environment: Mapping[str, str] = os.environ) -> int:
    """The most bytes that the arrays of a shard, a tensor or an array of a plan may take in memory.

    Raises:
        ConfigError: the environment variable is not a number above 0.
    """
    text = environment.get(LIMIT_VARIABLE, "")
    try:
        gib = float(text or DEFAULT_DECODED_GIB)
        if not 0 < gib < 1 << 20:
            raise ValueError
    except ValueError as error:
        raise ConfigError(f"{LIMIT_VARIABLE}={text}: expected a number of GiB above 0, such as {LIMIT_VARIABLE}=16") from error
    return int(gib * (1 << 30))


def raise_limit_hint(nbytes: int) -> str:
    """What to do about ``nbytes`` bytes that are more than :func:`max_decoded_bytes`, as the end of a message."""
    return f"if this cache is your own, set {LIMIT_VARIABLE}={-(-nbytes // (1 << 30))}"


def load_json(data: bytes) -> Any:
    """The content of JSON, whose length and depth are compared with the limits before it is parsed.

    Raises:
        ValueError: it is not JSON in UTF-8, too long, too deep, or has a number that is not finite.
    """
    if len(data) > MAX_JSON_BYTES:
        raise ValueError(f"found {len(data)} bytes of JSON, at most {MAX_JSON_BYTES} are read")
    structure = np.frombuffer(_STRING.sub(b"", data), np.uint8)
    depth = int(_STEPS[structure].cumsum(dtype=np.int64).max(initial=0))
    if depth > MAX_JSON_DEPTH:
        raise ValueError(f"found JSON of depth {depth}, at most {MAX_JSON_DEPTH} is read")
    return json.loads(data.decode(), parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"found {name}, expected a finite number")

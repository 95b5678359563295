"""What decides the answers of a run, written beside them, so that another model or other settings never continue it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.answer import AnswerConfig
from alignkd.pipeline.data.contract import Samples
from alignkd.pipeline.evaluate.running import identity
from alignkd.plugins import loaded_plugins

_ASKED = ("n", "temperature", "max_new_tokens", "dtype")
_DRAWN = ("top_p", "seed")
"""Settings that decide nothing where no token is drawn."""
_SHOWN = 40


def of_run(config: AnswerConfig, vlm: Vlm, samples: Samples, template: str, prompt_date: str) -> dict[str, Any]:
    """Everything that decides the answers; neither batches nor processes, nor where it runs."""
    names = _ASKED + (_DRAWN if config.temperature else ())
    given = {name: getattr(config, name) for name in names}
    given |= {"template": template, "prompt_date": prompt_date, "samples": len(samples)}
    given |= {"samples_sha256": hashlib.sha256(samples.keys.tobytes()).hexdigest(), **identity.of_model(vlm)}
    given |= {"plugins": [asdict(plugin)["sha256"] for plugin in loaded_plugins()]}
    found: dict[str, Any] = json.loads(json.dumps(given))
    return found


def check_same(folder: Path, given: Mapping[str, Any], out: str) -> None:
    """Refuse to continue answers that were given otherwise.

    Raises:
        ConfigError: names what differs.
    """
    there = identity.stored(folder)
    if differ := [name for name, value in given.items() if there and there.get(name) != value]:
        words = "; ".join(f"{name} is {_short(given[name])}, there it is {_short(there.get(name))}" for name in differ)
        raise ConfigError(
            f"--out {out} holds answers of another run: {words}. Give the settings of that run to continue it, or choose"
            f" another --out, or remove {out} and {folder}"
        )


def claim(folder: Path, given: Mapping[str, Any], out: str) -> None:
    """As :func:`check_same`; where there are no answers, this is what the next ones are given with.

    Raises:
        ConfigError: names what differs.
    """
    check_same(folder, given, out)
    if not identity.stored(folder):
        identity.put(folder, given)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."

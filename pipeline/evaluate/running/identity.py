"""What decides the answers of a run: written beside them, so that another model or other settings never continue it."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkd.errors import ConfigError
from alignkd.models.vlm import Vlm
from alignkd.pipeline.evaluate.benchmarks.contract import Benchmark
from alignkd.pipeline.evaluate.running.answering import Answering
from alignkd.pipeline.evaluate.running.parts import put_text
from alignkd.plain_files import read_plain

NAME = "settings.json"
_LARGEST = 2**20
_DIGEST = 12


def of_benchmark(benchmark: Benchmark, dtype: str, template: str | None) -> dict[str, Any]:
    """What is known before a model is loaded."""
    asked = [[q.question_id, q.turns, q.images, q.answers, q.category] for q in benchmark.questions]
    known = {
        "benchmark": benchmark.about.name,
        "protocol": benchmark.protocol,
        "questions": len(benchmark.questions),
        "questions_sha256": hashlib.sha256(json.dumps(asked).encode("utf-8", "surrogatepass")).hexdigest(),
        "max_new_tokens": benchmark.max_new_tokens,
        "dtype": dtype,
    }
    return known | ({} if template is None else {"template": template})


def of_model(vlm: Vlm) -> dict[str, Any]:
    """Digests of a model: of weights in the dtype that they are loaded in, tokenizer, chat template."""
    return {
        "weights_sha256": vlm.weights_fingerprint(),
        "tokenizer_sha256": vlm.tokenizer_fingerprint(),
        "chat_template_sha256": vlm.template_fingerprint(),
        "image_processor_sha256": vlm.image_fingerprint(),
    }


def of_prompts(answering: Answering) -> dict[str, Any]:
    """How questions become prompts."""
    return {
        "template": answering.template,
        "image_treatment": answering.image_treatment,
        "prompt_date": answering.encoder.prompt_date,
    }


def stored(folder: Path) -> dict[str, Any]:
    """What decides the answers that a folder holds; empty where it holds none."""
    try:
        found = json.loads(read_plain(folder / NAME, _LARGEST))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{folder / NAME} cannot be read ({error}): choose another --out, or remove {folder}") from error
    return found if isinstance(found, dict) else {}


def check_same(folder: Path, given: Mapping[str, Any]) -> None:
    """Refuse to continue answers that were given otherwise.

    Raises:
        ConfigError: names what differs.
    """
    there = stored(folder)
    differ = [name for name, value in given.items() if name in there and there[name] != value]
    if differ:
        words = "; ".join(
            f"{name} is {_short(name, given[name])}, the answers there have {_short(name, there[name])}" for name in differ
        )
        raise ConfigError(
            f"--out {folder.parent.parent} holds answers to {there.get('benchmark')} of another run: {words}. Give the settings"
            f" of that run to continue it, or choose another --out, or remove {folder.parent}"
        )


def claim(folder: Path, given: Mapping[str, Any]) -> None:
    """As :func:`check_same`; where there are no answers, this is what the next ones are given with.

    Raises:
        ConfigError: names what differs.
    """
    check_same(folder, given)
    if not stored(folder):
        put(folder, given)


def put(folder: Path, given: Mapping[str, Any]) -> None:
    """What the next answers are given with."""
    put_text(folder / NAME, json.dumps(dict(given), indent=1) + "\n")


def _short(name: str, value: Any) -> str:
    return str(value)[:_DIGEST] if name.endswith("sha256") else repr(value)

"""Whether a run may start in a folder, or resume there with these settings."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from transformers import TrainerState

from alignkd.errors import CheckpointError, ConfigError, wrap_errors
from alignkd.losses.recipes import recipe_record
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.runtime.files import check_out_folder
from alignkd.pipeline.runtime.printable import printable
from alignkd.pipeline.runtime.redact import redacted
from alignkd.pipeline.training.checkpoints import own_checkpoints
from alignkd.pipeline.training.run_inputs import RunInputs
from alignkd.pipeline.training.schedule import Schedule, check_same_order, step_record
from alignkd.pipeline.training.vision_input import TOWER_FILE
from alignkd.plugins import loaded_plugins

_MAY_CHANGE = (
    *("resume", "device", "plugins", "workers", "save_steps", "save_total_limit", "log_steps", "max_rejected", "out"),
    *("images", "data", "cache", "report_to", "term_gradients", "feature_bytes", "batch_size", "gradient_accumulation"),
    *("batch_tokens", "max_wait", "download", "eval_data", "eval_cache", "eval_images", "benchmark_root"),
    *("local_cache", "data_weight"),
)
"""Settings that may differ in a resumed run: none of them changes what is learned. Data, cache and plugins are compared by
content, batches by the samples that a step takes."""


_WRITTEN = (
    *("checkpoints", "student", "student-official", "adapter", "best", "tensorboard"),
    *("metrics.jsonl", "run.json", "result.json", "adapters.safetensors", TOWER_FILE),
)


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse to write over a run.

    Raises:
        ConfigError: the folder holds one, cannot be a folder, or a part of it lies elsewhere.
        CheckpointError: the run to resume has no record of its settings.
    """
    check_out_folder(out)
    for name in _WRITTEN:
        if not (out / name).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"--out {out}: {name} leads to {(out / name).resolve()}, outside of this folder, where nothing is written"
                " or removed; remove the link, or choose another folder"
            )
    if not resume and (out / "metrics.jsonl").exists():
        raise ConfigError(f"--out {out} already holds a run; continue it with --resume, or choose another folder")
    begun = (out / "metrics.jsonl").exists() or own_checkpoints(out / "checkpoints")
    if resume and begun and not (out / "run.json").is_file():
        raise CheckpointError(
            f"--resume: {out / 'run.json'} is missing, so the settings of the run are not known: restore the file, or choose"
            " another --out"
        )


def resolved_settings(inputs: RunInputs, data: TrainingSet, schedule: Schedule) -> dict[str, Any]:
    """The configuration as a run's record keeps it: defaults resolved, data and cache by their content."""
    config, prints = inputs.config, [cache.reader.fingerprint for cache in inputs.caches]
    return {
        **asdict(config),
        "template": inputs.template,
        "max_length": inputs.max_length,
        "prompt_date": data.preparer.encoder.prompt_date or None,
        "recipe": recipe_record(config.recipe),
        **_vision_input(inputs),
        "plugin_sha256": [plugin.sha256 for plugin in loaded_plugins()],
        "step": step_record(config, schedule),
        "steps": schedule.steps,
        "samples": len(data),
        "data_keys": data.fingerprint(),
        "data_weights": None if data.weights is None else hashlib.sha256(data.weights.tobytes()).hexdigest(),
        "cache_fingerprint": prints[0] if len(prints) == 1 else prints or None,
    }


def _vision_input(inputs: RunInputs) -> dict[str, str]:
    """Where a student that sees through its teacher's projector gets its vision tokens, in place of what was asked for."""
    if inputs.config.recipe.projector == "own":
        return {}
    return {"vision_input": "cache" if inputs.cached_tokens else "tower"}


def recorded_configuration(config: DistillConfig) -> dict[str, Any]:
    """The resolved configuration of the run that is resumed; empty for a new run, or where it cannot be read."""
    path = Path(config.out) / "run.json"
    if not config.resume or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())["configuration"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # damaged, which check_same_run tells
        return {}
    return found if isinstance(found, dict) else {}


def check_same_run(path: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings. ``path``: its record; ``resolved``: :func:`resolved_settings` now.

    Raises:
        CheckpointError: the record cannot be read.
        ConfigError: names each setting that differs, with both values.
    """
    if not path.is_file():
        return  # nothing was begun: check_out has looked
    unreadable = (
        f"--resume: {path} is damaged, so the settings of the run are not known: restore the file, or choose another --out"
    )
    with wrap_errors(CheckpointError, unreadable, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        before = dict(json.loads(path.read_text())["configuration"])
    now = redacted(resolved)  # the record holds no credentials, which may also differ from day to day
    check_same_order(before, now, path.parent)
    # A setting that the version of then did not have had the value that is the default now.
    before = redacted({"plugin_sha256": [], "data_weights": None, **_defaults(), "group_by_length": False, **before})
    differing = [
        f"{name}: {before.get(name)!r} before, {value!r} now"
        for name, value in now.items()
        if name not in _MAY_CHANGE and before.get(name) != value
    ]
    if differing:
        raise ConfigError(
            f"--resume: {path.parent} was run with other settings: {'; '.join(differing)}. Resume with the same settings, or"
            " choose another --out"
        )


_STATE_BYTES = 2**28
_COUNTS = ("global_step", "max_steps", "num_train_epochs", "train_batch_size", "num_input_tokens_seen", "save_steps")
_MOST = 2**53


def check_trainer_state(path: Path, step: int) -> None:
    """Refuse a state of Trainer that no run can have written. ``step``: the checkpoint's.

    Raises:
        CheckpointError: names what was found.
    """
    damaged = f"--resume: {path} is damaged or was made by hand; remove its folder to resume from the checkpoint before it"
    try:
        size = path.stat().st_size
        if size > _STATE_BYTES:
            raise CheckpointError(f"{damaged}: {size} bytes, expected at most {_STATE_BYTES}")
        state = json.loads(path.read_text())
        unknown = sorted(state.keys() - {field.name for field in fields(TrainerState)})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"{damaged} ({error})") from error
    problems = [f"an unknown field {name!r}" for name in unknown[:2]]
    problems += [f"{name} {state.get(name)!r}" for name in _COUNTS if not _is_count(state.get(name, 0))]
    if not problems and not state.get("global_step") == step <= state.get("max_steps", step):
        problems.append(f"step {state.get('global_step')!r} of {state.get('max_steps')!r}, expected step {step}")
    for name, kind in (("log_history", list), ("stateful_callbacks", dict)):
        if not isinstance(state.get(name), kind | None):
            problems.append(f"{name} is no {kind.__name__}")
    if any(not isinstance(entry, dict) for entry in state.get("log_history") or ()):
        problems.append("log_history with entries that are no objects")
    problems += [f"{name} {state[name]!r}" for name in ("epoch", "total_flos") if not _is_number(state.get(name, 0))]
    problems += [f"{name} is set" for name in ("best_model_checkpoint", "best_global_step") if state.get(name)]
    if problems:
        raise CheckpointError(f"{damaged}: {printable('; '.join(problems))[:300]}")


def _is_number(value: Any) -> bool:
    usual = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (usual and -_MOST <= value <= 2.0**100)


def _is_count(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST)


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(DistillConfig) if field.default is not MISSING}


def check_processes(config: DistillConfig, before: int, now: int) -> None:
    """Refuse another number of processes than the checkpoint's where DeepSpeed wrote it.

    Raises:
        ConfigError: both numbers.
    """
    if config.deepspeed is not None and before != now:
        raise ConfigError(
            f"--resume: the checkpoint was written by {before} processes. DeepSpeed's files can only be read by the same"
            f" number, not by {now}: resume with {before}"
        )

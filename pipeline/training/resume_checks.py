"""Whether a run may start in a folder, or resume there with these settings."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from alignkd.errors import CheckpointError, ConfigError, wrap_errors
from alignkd.losses.recipes import recipe_record
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.runtime.files import check_out_folder
from alignkd.pipeline.runtime.redact import redacted
from alignkd.pipeline.training.run_inputs import RunInputs
from alignkd.pipeline.training.schedule import Schedule, check_same_order, step_record
from alignkd.plugins import loaded_plugins

_MAY_CHANGE = (
    *("resume", "device", "plugins", "workers", "save_steps", "save_total_limit", "log_steps", "max_rejected", "out"),
    *("images", "data", "cache", "report_to", "term_gradients", "feature_bytes", "batch_size", "gradient_accumulation"),
    *("batch_tokens", "max_wait"),
)
"""Settings that may differ in a resumed run: none of them changes what is learned. Data, cache and plugins are compared by
content, batches by the samples that a step takes."""


def check_out(out: Path, *, resume: bool) -> None:
    """Refuse to write over a run.

    Raises:
        ConfigError: the folder holds one, or cannot be a folder.
    """
    check_out_folder(out)
    if not resume and (out / "metrics.jsonl").exists():
        raise ConfigError(f"--out {out} already holds a run; continue it with --resume, or choose another folder")


def resolved_settings(inputs: RunInputs, data: TrainingSet, schedule: Schedule) -> dict[str, Any]:
    """The configuration as a run's record keeps it: defaults resolved, data and cache by their content."""
    config = inputs.config
    return {
        **asdict(config),
        "template": inputs.template,
        "max_length": inputs.max_length,
        "prompt_date": data.preparer.encoder.prompt_date or None,
        "recipe": recipe_record(config.recipe),
        "plugin_sha256": [plugin.sha256 for plugin in loaded_plugins()],
        "step": step_record(config, schedule),
        "steps": schedule.steps,
        "samples": len(data),
        "data_keys": data.fingerprint(),
        "cache_fingerprint": inputs.reader.fingerprint if inputs.reader else None,
    }


def check_same_run(path: Path, resolved: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings. ``path``: its record; ``resolved``: :func:`resolved_settings` now.

    Raises:
        CheckpointError: the record cannot be read.
        ConfigError: names each setting that differs, with both values.
    """
    if not path.is_file():
        return
    unreadable = (
        f"--resume: {path} is damaged, so the settings of the run are not known: restore the file, or choose another --out"
    )
    with wrap_errors(CheckpointError, unreadable, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        before = dict(json.loads(path.read_text())["configuration"])
    now = redacted(resolved)  # the record holds no credentials, which may also differ from day to day
    check_same_order(before, now, path.parent)
    # A setting that the version of then did not have had the value that is the default now.
    before = redacted({"plugin_sha256": [], **_defaults(), "group_by_length": False, **before})
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

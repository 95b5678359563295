"""Trainer's arguments, made from a run's configuration."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from alignkd.errors import ConfigError, wrap_errors
from alignkd.extras import require
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.training.deepspeed_configs import read_deepspeed_config

_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}
"""Packages of trackers that are not called as the tracker."""


def training_arguments(config: DistillConfig, out: Path, device: str, *, steps: int) -> TrainingArguments:
    """Made after the student was loaded: with ZeRO-3 they change how transformers loads models.

    Raises:
        ConfigError: a DeepSpeed configuration, a dtype, a launcher's environment or a tracker that cannot be used here.
    """
    answers_learn = config.recipe.supervised > 0 or bool(config.recipe.divergences)
    deepspeed = _deepspeed(config.deepspeed)
    with wrap_errors(ConfigError, "these settings cannot be used for training here", ValueError, ImportError):
        return TrainingArguments(
            output_dir=str(out / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=config.samples_at_once or 1,  # DeepSpeed asks for it; our own sampler decides
            gradient_accumulation_steps=config.gradient_accumulation,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=config.warmup,
            weight_decay=config.weight_decay,
            max_grad_norm=1.0,
            seed=config.seed,
            bf16=config.dtype == "bfloat16",
            fp16=config.dtype == "float16",
            use_cpu=device == "cpu",
            deepspeed=deepspeed,
            logging_steps=config.log_steps,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it waits for the device every step; FiniteCheck finds such losses without
            save_steps=config.save_steps,
            save_total_limit=None,  # Trainer would count, and remove, folders of the user whose names begin alike
            dataloader_num_workers=config.workers if config.workers is not None else (4 if device != "cpu" else 0),
            remove_unused_columns=False,
            ignore_data_skip=True,  # our sampler starts where the checkpoint ends
            report_to=[name for name in config.report_to if name not in ("tensorboard", "none")],
            disable_tqdm=True,
            ddp_timeout=int(config.max_wait),
            ddp_broadcast_buffers=False,  # all of them are constants
            ddp_find_unused_parameters=not answers_learn,  # where answers learn, the objective uses every parameter
            average_tokens_across_devices=False,  # the trainer counts a whole step itself
        )


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that transformers does not know, or whose package is not installed.

    Raises:
        ConfigError: names the package and how to install it, or the trackers that are known.
    """
    for name in names:
        if name == "none":
            continue
        if name not in INTEGRATION_TO_CALLBACK:
            near = get_close_matches(name, INTEGRATION_TO_CALLBACK, 1)
            known = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(INTEGRATION_TO_CALLBACK))} and none"
            raise ConfigError(f"--report-to {name}: transformers knows no tracker of this name; {known}")
        package = _PACKAGES.get(name, name)
        hint = " (or give --report-to none)" if name == "tensorboard" else ""
        require(package, f"--report-to {name}{hint}")
        if name not in (*get_available_reporting_integrations(), "tensorboard", "flyte"):  # flyte: no check in transformers
            raise ConfigError(f"--report-to {name}: transformers cannot use the package {package} that is installed here")


def zero_stage(deepspeed: str | None) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 without one."""
    if deepspeed is None:
        return 0
    return int(read_deepspeed_config(deepspeed).get("zero_optimization", {}).get("stage", 0))


def _deepspeed(name_or_file: str | None) -> dict[str, Any] | None:
    if name_or_file is None:
        return None
    return read_deepspeed_config(name_or_file)

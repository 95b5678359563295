"""Trainer's arguments, from ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from alignkd.pipeline.runtime.devices import pick_device
from alignkd.pipeline.runtime.ranks import Worker
from alignkd.pipeline.training.deepspeed_configs import deepspeed_config

if TYPE_CHECKING:
    from alignkd.pipeline.config.distill import DistillConfig


def training_arguments(config: DistillConfig, out: Path, process: Worker, *, steps: int) -> TrainingArguments:
    """Made after the student was loaded: with ZeRO-3 they change how transformers loads models.

    Raises:
        ValueError: a DeepSpeed configuration that cannot be used.
    """
    device = pick_device(config.device, process.local_rank)
    answers_learn = config.recipe.supervised > 0 or bool(config.recipe.divergences)
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=config.samples_at_once or 1,  # known to DeepSpeed, decided by our own sampler
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
        deepspeed=_deepspeed(config.deepspeed),
        logging_steps=config.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # waits for the device every step; losses are watched without
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        dataloader_num_workers=config.workers if config.workers is not None else (4 if device != "cpu" else 0),
        remove_unused_columns=False,
        ignore_data_skip=True,  # our sampler starts where the checkpoint ends
        report_to=[name for name in config.report_to if name not in ("tensorboard", "none")],
        disable_tqdm=True,
        ddp_broadcast_buffers=False,  # all of them are constants
        ddp_find_unused_parameters=not answers_learn,  # then the objective touches every parameter
        average_tokens_across_devices=False,  # the trainer counts a whole step itself
    )


def zero_stage(deepspeed: str | None) -> int:
    """The ZeRO stage of a DeepSpeed configuration; 0 without one."""
    if deepspeed is None:
        return 0
    return int(json.loads(deepspeed_config(deepspeed).read_text()).get("zero_optimization", {}).get("stage", 0))


def _deepspeed(name_or_file: str | None) -> dict[str, Any] | None:
    if name_or_file is None:
        return None
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError("--deepspeed needs DeepSpeed: pip install 'alignkd[deepspeed]'") from error
    found: dict[str, Any] = json.loads(deepspeed_config(name_or_file).read_text())
    return found

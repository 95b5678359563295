"""The steps of a run: how many there are, and the order that decides which samples each of them takes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignkd.errors import ConfigError
from alignkd.models.vlm import Vlm
from alignkd.pipeline.config.distill import DistillConfig
from alignkd.pipeline.feeding.dataset import TrainingSet
from alignkd.pipeline.feeding.lengths import check_budget, sample_lengths
from alignkd.pipeline.feeding.order import WINDOW_SHARDS, BatchOrder
from alignkd.pipeline.runtime.ranks import Worker


@dataclass(frozen=True)
class Schedule:
    """``steps`` steps, taken from ``order`` one after the other. ``lengths``: of its samples, None where it needs none."""

    order: BatchOrder
    steps: int
    lengths: np.ndarray | None = None

    @property
    def per_step(self) -> int:
        """Micro-batches of a step, over all processes."""
        return self.order.per_step

    def epoch(self, step: int) -> float:
        """Passes over the data after a step."""
        epoch = 0
        while step > (steps := self.order.steps_per_epoch(epoch)):
            epoch, step = epoch + 1, step - steps
        return epoch + step / steps


def make_schedule(config: DistillConfig, data: TrainingSet, student: Vlm, process: Worker) -> Schedule:
    """The schedule of a configuration. Finds the length of every sample where batches depend on it.

    Raises:
        ConfigError: a sample that is longer than ``batch_tokens``.
    """
    lengths = None
    if config.group_by_length or config.batch_tokens is not None:
        show = process.rank == 0
        lengths = sample_lengths(data, student, Path(config.out), workers=config.workers or 0, show=show)
        if config.batch_tokens is not None:
            check_budget(data, lengths, config.batch_tokens)
    order = BatchOrder(
        data.shard_of_sample,
        seed=config.seed,
        window=WINDOW_SHARDS,
        batch_size=config.samples_at_once,
        per_step=config.gradient_accumulation * process.world_size,
        lengths=lengths,
        group_by_length=config.group_by_length,
        batch_tokens=config.batch_tokens,
        text_only=data.text_only,
        weights=data.weights,
    )
    return Schedule(order, config.max_steps or order.total_steps(config.epochs), lengths)


def step_record(config: DistillConfig, schedule: Schedule) -> dict[str, Any]:
    """What determines the samples of a step besides data and seed, for a run's record.

    Without a budget of positions, the split of a step into micro-batches changes nothing.
    """
    lengths = {} if schedule.lengths is None else {"lengths": hashlib.sha256(schedule.lengths.tobytes()).hexdigest()[:16]}
    if config.batch_tokens is None:
        assert config.samples_at_once is not None
        return {"samples": schedule.per_step * config.samples_at_once, **lengths}
    samples, positions = config.samples_at_once, config.batch_tokens
    return {"micro_batches": schedule.per_step, "samples": samples, "positions": positions, **lengths}


def check_same_order(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run whose steps took samples in another way: grouped by length or not, or by an earlier version.

    ``before`` and ``now``: the settings in its record, and those of now.

    Raises:
        ConfigError: the reason, and what to do.
    """
    grouped, group = bool(before.get("group_by_length", False)), bool(now["group_by_length"])
    if grouped != group:
        way = {True: "grouped by length", False: "not grouped by length"}
        option = "--group-by-length" if grouped else "--no-group-by-length"
        raise ConfigError(
            f"--resume: the samples of the run in {folder} are {way[grouped]}, and here they would be {way[group]}, so that its"
            f" steps would take other samples. Give {option} to continue it, or choose another --out"
        )
    step = before.get("step", {})
    if grouped and isinstance(step, Mapping) and "lengths" not in step:
        raise ConfigError(
            f"--resume: the run in {folder} was begun by a version of alignkd that grouped samples by length in another way:"
            " continue it with that version (see versions in its run.json), or choose another --out"
        )
